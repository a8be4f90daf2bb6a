from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from clip_rd_edge.data.tasks import RetrievalTask, ZeroShotTask, load_task
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


def test_class_names_and_templates_of_clip_benchmark(folder: Path) -> None:
    (folder / "classnames.txt").write_text("cat\ndog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}\n")
    task = load_task(str(folder))
    assert isinstance(task, ZeroShotTask)
    assert (task.labels, task.templates) == (("cat", "dog"), ("a photo of a {c}",))


def test_a_wrong_number_of_class_names_is_refused(folder: Path) -> None:
    (folder / "classnames.txt").write_text("cat\n")
    with pytest.raises(InputError, match="1 names for 2 subfolders"):
        load_task(str(folder))


def test_a_table_with_a_row_that_is_no_pair_is_no_task(folder: Path) -> None:
    table = folder / "pairs.csv"
    table.write_text("filepath,title\na_cat/1.png,a cat\na_cat/2.png,a cat\n")
    with pytest.raises(InputError, match=r"pairs\.csv, line 3: the image 'a_cat/2\.png' exists neither"):
        load_task(str(table))


@pytest.mark.parametrize("name", ["pairs.txt", "PAIRS.CSV"])
def test_a_table_of_any_name_is_a_task_as_it_is_data(folder: Path, name: str) -> None:
    (folder / name).write_text("filepath,title\na_cat/1.png,a cat\nb_dog/1.png,a dog\n")
    task = load_task(str(folder / name))
    assert isinstance(task, RetrievalTask)
    assert task.captions == ("a cat", "a dog")


def test_a_table_with_a_list_of_captions_in_a_cell_is_no_task(folder: Path) -> None:
    table = folder / "pairs.csv"
    table.write_text("filepath,title\na_cat/1.png,\"['a cat', 'a pet']\"\n")
    with pytest.raises(InputError, match=r"pairs\.csv, line 2: the caption .* is a list; expected one row"):
        load_task(str(table))


def test_an_unknown_task_gets_suggestions() -> None:
    with pytest.raises(InputError, match="Did you mean 'emoji:unseen-style'"):
        load_task("emoji:unseen-stile")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images"):
        load_task(str(tmp_path))
