from __future__ import annotations

import io
import tarfile
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from clip_rd_edge.benchmarking.suite import Suite, SuiteRow, find_suite, parse_models, read_suite
from clip_rd_edge.data.tasks import ZeroShotTask
from clip_rd_edge.errors import ConfigError, InputError

GOOD = """
name: mine
tasks: [emoji:unseen-style]
rows:
  - {label: A, model: a, role: student}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "suite.yaml"
    path.write_text(text)
    return path


def test_a_suite_has_defaults(tmp_path: Path) -> None:
    suite = read_suite(write(tmp_path, GOOD))
    assert suite.rows == (SuiteRow(label="A", model="a", role="student"),)
    assert (suite.root, suite.threads, suite.rounds) == (None, 1, 50)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tasks:", "taks:", r"unknown field `taks`\. Did you mean 'tasks'"),
        ("role: student", "role: pupil", r"Invalid enum value 'pupil' - at `\$\.rows\[0\]\.role`"),
        ("[emoji:unseen-style]", "[]", "has no tasks; at least one is required"),
        ("name: mine", "name: mine\nthreads: 0", r"`int` >= 1 - at `\$\.threads`"),
        ("name: mine", "name: mine\nrounds: -1", r"`int` >= 1 - at `\$\.rounds`"),
        ("name: mine", "name: mine\nbudget_ms: .nan", r"`float` > 0.* - at `\$\.budget_ms`"),
        ("name: mine", "name: mine\nbudget_ms: .inf", r"budget_ms is inf; expected a finite number"),
        ("name: mine", "name: mine\nmin_accuracy: 25", r"`float` <= 1.* - at `\$\.min_accuracy`"),
        ("  - {", "  - {label: A, model: b, role: teacher}\n  - {", "has the label 'A' twice"),
        ("name: mine", "name: [mine", "is not valid YAML"),
    ],
)
def test_errors_name_the_problem(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=message) as caught:
        read_suite(path)
    assert str(caught.value).startswith(str(path))


def test_models_and_tasks_are_relative_to_the_root(suite: Suite) -> None:
    assert suite.resolve_model(suite.rows[0]) == str(Path(suite.root or "") / "teacher")
    (task,) = suite.load_tasks()
    assert isinstance(task, ZeroShotTask)
    assert len(task.images) == 12


def test_a_hub_model_is_left_unchanged(suite: Suite) -> None:
    assert suite.resolve_model(SuiteRow(label="B", model="hf-hub:org/model", role="teacher")) == "hf-hub:org/model"


def test_a_shipped_suite_is_found_by_name() -> None:
    suite = read_suite(find_suite("quickstart"))
    assert [row.role for row in suite.rows] == ["teacher", "baseline", "student", *3 * ["exported"], "quantised"]
    assert suite.tasks[0] == "emoji:unseen-style"


def test_an_unknown_suite_suggests_similar_names() -> None:
    with pytest.raises(InputError, match=r"no suite 'quikstart': .* Did you mean 'quickstart'"):
        find_suite("quikstart")
    with pytest.raises(InputError, match=r"nor one of paper, quickstart\."):
        find_suite("nothing")
    with pytest.raises(InputError, match=r"nor one of .*equal-time, frozen-text, method-evidence, tokens, trimmed\."):
        find_suite("nothing", key="methods")


def test_the_paper_suite_has_tasks_and_no_models_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no rows"):
        read_suite(find_suite("paper"))
    row = SuiteRow(label="Student", model="runs/a", role="student")
    suite = read_suite(find_suite("paper"), rows=(row,), data_root=str(tmp_path))
    assert len(suite.tasks) == 14
    assert suite.rows == (row,)
    assert set(suite.missing()) == set(suite.tasks)
    with pytest.raises(InputError, match=r"None of the 14 tasks of the suite paper is in .*: imagenet1k, imagenetv2"):
        suite.load_tasks()


@pytest.mark.parametrize("folder", ["vtab/cifar10", "wds_vtab-cifar10", "vtab-cifar10", "cifar10", "wds_cifar10"])
def test_a_task_is_found_under_any_of_clip_benchmarks_names(tmp_path: Path, folder: str) -> None:
    for name in ("ship", "frog"):
        (tmp_path / folder / "test" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "test" / name / "1.png")
    rows = (SuiteRow(label="A", model="a", role="student"),)
    tasks = ("imagenet1k", "vtab/cifar10")
    suite = Suite(name="x", rows=rows, tasks=tasks, data_root=str(tmp_path), missing_tasks="skip")
    (task,) = suite.load_tasks()
    assert isinstance(task, ZeroShotTask)
    assert (task.name, task.labels) == ("cifar10", ("frog", "ship"))
    assert list(suite.missing()) == ["imagenet1k"]
    assert "under any of the names imagenet1k, wds_imagenet1k" in suite.missing()["imagenet1k"]


@pytest.mark.parametrize("task", ["gone/", "other/test", "{root}/elsewhere/things"])
def test_a_task_that_is_missing_is_not_replaced_by_another_folder(tmp_path: Path, task: str) -> None:
    for folder in ("cats", "dogs", "test/cats", "test/dogs", "things/cats", "things/dogs"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "1.png")
    suite = read_suite(write(tmp_path, GOOD.replace("emoji:unseen-style", f'"{task.format(root=tmp_path)}"')))
    with pytest.raises(InputError, match=r"No task named"):
        Suite.load_tasks(msgspec.structs.replace(suite, root=str(tmp_path), data_root=str(tmp_path)))


def test_shards_are_found_under_the_root_and_skipped_only_if_they_are_missing(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for name, content in ((f"{shard}.png", image.getvalue()), (f"{shard}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    tasks = "[emoji:unseen-style, '{0..1}.tar', '{2..3}.tar']"
    text = GOOD.replace("[emoji:unseen-style]", tasks) + f"root: {tmp_path}\nmissing_tasks: skip\n"
    suite = read_suite(write(tmp_path, text))
    assert suite.missing() == {
        "{2..3}.tar": f"The shard {tmp_path}/2.tar does not exist (2 of 2 in {tmp_path}/{{2..3}}.tar missing)."
    }
    assert [len(task.images) for task in suite.load_tasks()][1:] == [2]


def test_a_task_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    suite = read_suite(write(tmp_path, GOOD.replace("unseen-style]", "unseen-style, emoji:unseen-style]")))
    assert len(suite.load_tasks()) == 1


def test_models_from_the_command_line() -> None:
    rows = parse_models(["teacher=hf-hub:o/m", "student=runs/a", "student=runs/b/"])
    assert [(row.label, row.model, row.role) for row in rows] == [
        ("Teacher", "hf-hub:o/m", "teacher"),
        ("Student a", "runs/a", "student"),
        ("Student b", "runs/b/", "student"),
    ]


@pytest.mark.parametrize("model", ["runs/a", "pupil=runs/a", "student="])
def test_a_model_without_a_role_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="is not ROLE=MODEL with one of the roles teacher, baseline, student"):
        parse_models([model])


def test_models_whose_folders_have_the_same_name_are_told_apart_by_their_paths() -> None:
    rows = parse_models(["student=runs/a/best", "student=runs/b/best", "student=runs/c", "exported=best"])
    assert [row.label for row in rows] == ["Student runs/a/best", "Student runs/b/best", "Student c", "Exported"]
