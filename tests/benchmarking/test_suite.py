from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace
from PIL import Image
from support import assert_form

from clip_rd_edge.benchmarking.suite import Suite, SuiteRow, find_suite, read_suite
from clip_rd_edge.data.tasks import ZeroShotTask
from clip_rd_edge.errors import ConfigError, InputError

GOOD = """
name: mine
tasks: [emoji:unseen-style]
rows:
  - {label: A, model: a, role: student}
"""
ROW = SuiteRow(label="A", model="a", role="student")


def write(folder: Path, text: str) -> Path:
    path = folder / "suite.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("role: student", "role: pupil"),
        ("name: mine", "name: mine\nbudget_ms: .nan"),
        ("  - {", "  - {label: A, model: b, role: teacher}\n  - {"),
        ("name: mine", "name: [mine"),
    ],
)
def test_an_invalid_suite_is_an_error_that_names_it(tmp_path: Path, old: str, new: str) -> None:
    suite = read_suite(write(tmp_path, GOOD))
    assert (suite.rows, suite.root, suite.threads, suite.rounds) == ((ROW,), None, 1, 50)
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read_suite(path)
    assert str(caught.value).startswith(str(path))
    assert_form(str(caught.value), caught.value.hint)


def test_models_and_tasks_are_relative_to_the_root(suite: Suite) -> None:
    assert suite.resolve_model(suite.rows[0]) == str(Path(suite.root or "") / "teacher")
    (task,) = suite.load_tasks()
    assert isinstance(task, ZeroShotTask)
    assert len(task.images) == 12
    assert suite.resolve_model(SuiteRow(label="B", model="hf-hub:org/model", role="teacher")) == "hf-hub:org/model"
    assert len(replace(suite, tasks=("task", "task")).load_tasks()) == 1


def test_a_shipped_suite_is_found_by_name(tmp_path: Path) -> None:
    suite = read_suite(find_suite("quickstart"))
    assert [row.role for row in suite.rows] == ["teacher", "baseline", "student", *3 * ["exported"], "quantised"]
    assert suite.tasks[0] == "emoji:unseen-style"
    with pytest.raises(InputError, match=r"Did you mean 'quickstart'"):
        find_suite("quikstart")
    with pytest.raises(InputError):
        find_suite("nothing", key="methods")
    with pytest.raises(ConfigError):  # it has tasks, and no models of its own
        read_suite(find_suite("paper"))
    paper = read_suite(find_suite("paper"), rows=(ROW,), data_root=str(tmp_path))
    assert (len(paper.tasks), paper.rows) == (14, (ROW,))
    assert set(paper.missing()) == set(paper.tasks)
    with pytest.raises(InputError):
        paper.load_tasks()


def save_images(root: Path, *folders: str) -> None:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(root / folder / "1.png")


@pytest.mark.parametrize("folder", ["vtab/cifar10", "wds_vtab-cifar10", "cifar10"])
def test_a_task_is_found_under_any_of_clip_benchmarks_names(tmp_path: Path, folder: str) -> None:
    save_images(tmp_path, f"{folder}/test/ship", f"{folder}/test/frog")
    tasks = ("imagenet1k", "vtab/cifar10")
    suite = Suite(name="x", rows=(ROW,), tasks=tasks, data_root=str(tmp_path), missing_tasks="skip")
    (task,) = suite.load_tasks()
    assert isinstance(task, ZeroShotTask)
    assert (task.name, task.labels) == ("cifar10", ("frog", "ship"))
    assert list(suite.missing()) == ["imagenet1k"]
    assert "under any of the names imagenet1k, wds_imagenet1k" in suite.missing()["imagenet1k"]
