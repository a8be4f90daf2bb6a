from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from clip_rd_edge.contract.task import ZeroShotTask
from clip_rd_edge.data.tasks import load_task
from clip_rd_edge.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b_dog", "a_cat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    return tmp_path


def test_an_image_folder(folder: Path) -> None:
    task = load_task(str(folder))
    assert isinstance(task, ZeroShotTask)
    assert task.labels == ("a cat", "b dog")
    assert [path.parent.name for path in task.images] == ["a_cat", "b_dog"]
    assert task.targets == (0, 1)


def test_clip_benchmarks_class_names_and_templates(folder: Path) -> None:
    (folder / "classnames.txt").write_text("cat\ndog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}\n")
    task = load_task(str(folder))
    assert isinstance(task, ZeroShotTask)
    assert (task.labels, task.templates) == (("cat", "dog"), ("a photo of a {c}",))


def test_class_names_that_do_not_match(folder: Path) -> None:
    (folder / "classnames.txt").write_text("cat\n")
    with pytest.raises(InputError, match="1 names for 2 sub-folders"):
        load_task(str(folder))


def test_an_unknown_task_has_near_matches() -> None:
    with pytest.raises(InputError, match="Did you mean 'emoji:unseen-style'"):
        load_task("emoji:unseen-stile")


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pictures"):
        load_task(str(tmp_path))
