"""Short runs that rank teachers for a student."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from support import Watch

import clip_rd_edge as edge
from clip_rd_edge.benchmarking.metrics import Interval, Recall, RetrievalScore, Score, ZeroShotScore
from clip_rd_edge.cli.probe_teachers import command
from clip_rd_edge.distillation import probe as probing
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.probe import Probe, ProbedTeacher
from clip_rd_edge.distillation.teachers.embedding_store import MANIFEST
from clip_rd_edge.errors import UsageError
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.models.student import build_student, student_config
from clip_rd_edge.utils.structs import read_yaml

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def source(pairs_csv: Path, tmp_path: Path) -> dict[str, Any]:
    """Two teachers and a small run."""
    teachers = []
    for number in range(2):
        torch.manual_seed(number)
        config = student_config("test_resnet", embedding_size=16, image_size=32, text="64x1", context_length=8)
        teachers.append(tmp_path / f"teacher {number}")
        save_clip(teachers[-1], build_student(config, name=f"teacher {number}"), provenance={})
    small = {"image_size": 32, "text": "64x1", "context_length": 8, "batch_size": 6, "steps": 3}
    return {
        "teachers": teachers, "data": pairs_csv, "student": "test_resnet", "precision": "fp32", "workers": 0, **small
    }  # fmt: skip


def zero_shot(top1: float, spread: float = 0.05) -> ZeroShotScore:
    interval = Interval(low=top1 - spread, high=top1 + spread)
    return ZeroShotScore(
        task="colours", images=9, classes=3, top1=top1, top1_interval=interval, top5=None, mean_per_class=top1
    )


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were evaluated, in turn; the student of the second teacher is the better one."""
    names: list[str] = []
    scores = {"teacher 0": 0.9, "teacher-0": 0.2, "teacher 1": 0.5, "teacher-1": 0.4}

    def evaluate(encoder: Any, task: object) -> Score:
        names.append(next(name for name in scores if encoder.clip.name.endswith(name)))
        return zero_shot(scores[names[-1]])

    monkeypatch.setattr(probing, "evaluate", evaluate)
    return names


def test_teachers_are_ranked_by_what_a_student_learned(
    source: dict[str, Any], evaluations: list[str], tmp_path: Path
) -> None:
    first, second = map(str, source["teachers"])
    probe = edge.probe_teachers(**source, tasks=str(source["data"]), output=tmp_path / "probe")
    assert [teacher.teacher for teacher in probe.teachers] == [second, first]
    assert [(teacher.student_mean, teacher.teacher_mean) for teacher in probe.teachers] == [(0.4, 0.5), (0.2, 0.9)]
    assert (probe.student, probe.steps, probe.is_certain()) == ("test_resnet", 3, True)
    record = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert [teacher["teacher"] for teacher in record["teachers"]] == [second, first]
    runs = sorted(path.parent for path in (tmp_path / "probe").glob("*/student"))
    assert [run.name[-9:] for run in runs] == ["teacher-0", "teacher-1"]
    configs = [read_yaml(run / "config.yaml", RunConfig) for run in runs]
    assert [config.teacher for config in configs] == [first, second]
    configs = [msgspec.structs.replace(config, teacher=None) for config in configs]
    assert configs[0] == configs[1]  # the seed and all else are the same


def test_a_recipe_without_a_teacher_ranks_none(source: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="The recipe clip has no teacher"):
        edge.probe_teachers(**source, recipe="clip", tasks=str(source["data"]), output=tmp_path / "probe")
    assert not (tmp_path / "probe").exists()


def test_the_steps_of_a_probe_may_be_those_of_epochs(
    source: dict[str, Any], evaluations: list[str], tmp_path: Path
) -> None:
    options = {**{name: value for name, value in source.items() if name != "steps"}, "epochs": 1}
    for _ in ("at first", "finished"):
        assert edge.probe_teachers(**options, tasks=str(source["data"]), output=tmp_path / "probe").steps == 4


def test_an_interrupted_probe_goes_on_with_the_same_call(
    source: dict[str, Any], evaluations: list[str], tmp_path: Path
) -> None:
    steps: list[int] = []

    def stop(step: int) -> None:
        steps.append(step)
        if len(steps) == 5:  # the second teacher's second step
            raise MemoryError("like a kill")

    options = {**source, "tasks": str(source["data"]), "output": tmp_path / "probe"}
    with pytest.raises(MemoryError):
        edge.probe_teachers(**options, reporter=Watch(on_step=stop))
    assert evaluations == ["teacher 0", "teacher-0"]
    assert len(edge.probe_teachers(**options).teachers) == 2
    assert evaluations == ["teacher 0", "teacher-0", "teacher 1", "teacher-1"]
    with pytest.raises(UsageError, match=r"holds a run with another configuration: steps: 3 → 4"):
        edge.probe_teachers(**{**options, "steps": 4})


def test_teachers_are_all_ranked_by_the_same_tasks(
    source: dict[str, Any], evaluations: list[str], tmp_path: Path
) -> None:
    first, second = map(str, source["teachers"])
    options = {**source, "output": tmp_path / "probe"}
    edge.probe_teachers(**{**options, "teachers": [first]}, tasks=str(source["data"]))
    copy = source["data"].with_name("others.csv")
    copy.write_bytes(source["data"].read_bytes())
    probe = edge.probe_teachers(**options, tasks=str(copy))
    assert evaluations == ["teacher 0", "teacher-0"] * 2 + ["teacher 1", "teacher-1"]
    (names,) = {(*teacher.teacher_scores, *teacher.student_scores) for teacher in probe.teachers}
    assert [teacher.teacher for teacher in probe.teachers] == [second, first]
    assert names[0] == names[1]
    assert "others" in names[0]


def test_another_task_of_the_same_name_is_measured_again(
    source: dict[str, Any], evaluations: list[str], tmp_path: Path
) -> None:
    options = {**source, "teachers": source["teachers"][:1], "output": tmp_path / "probe"}

    def evaluated_on(task: Path) -> int:
        evaluations.clear()
        edge.probe_teachers(**options, tasks=str(task))
        return len(evaluations)

    assert [evaluated_on(source["data"]), evaluated_on(source["data"])] == [2, 0]
    lines = source["data"].read_text().replace("pictures/", f"{source['data'].parent}/pictures/").splitlines()
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / source["data"].name
    other.write_text("\n".join(lines[:9]))
    assert [evaluated_on(other), evaluated_on(other)] == [2, 0]
    result = tmp_path / "probe" / "probe.json"
    older = {name: value for name, value in json.loads(result.read_text()).items() if name != "tasks"}
    result.write_text(json.dumps(older))
    assert [evaluated_on(other), evaluated_on(other)] == [2, 0]


def test_a_student_that_was_trained_again_is_measured_again(
    source: dict[str, Any], evaluations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**source, "teachers": source["teachers"][:1], "tasks": str(source["data"]), "output": tmp_path / "probe"}
    edge.probe_teachers(**options)
    (run,) = (path.parent for path in (tmp_path / "probe").glob("*/config.yaml"))
    shutil.rmtree(run)
    options["steps"] = 4

    def killed(*_: object, **__: object) -> None:
        raise MemoryError("like a kill")

    with monkeypatch.context() as patch:
        patch.setattr(probing, "load_clip", killed)
        with pytest.raises(MemoryError):
            edge.probe_teachers(**options)
    assert (run / "student").is_dir()
    edge.probe_teachers(**options)
    assert evaluations == ["teacher 0", "teacher-0"] * 2
    assert json.loads((tmp_path / "probe" / "probe.json").read_text())["steps"] == 4


def test_the_result_on_disk_has_all_teachers_in_whatever_order_they_are_named(
    source: dict[str, Any], evaluations: list[str], tmp_path: Path
) -> None:
    options = {**source, "tasks": str(source["data"]), "output": tmp_path / "probe"}
    edge.probe_teachers(**{**options, "teachers": source["teachers"][:1]})
    probe = edge.probe_teachers(**{**options, "teachers": source["teachers"][::-1]})
    record = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert [teacher["teacher"] for teacher in record["teachers"]] == [teacher.teacher for teacher in probe.teachers]


def test_a_number_of_steps_is_the_default(
    source: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "DEFAULT_STEPS", 2)
    del source["steps"]
    probe = edge.probe_teachers(**source, tasks=str(source["data"]), output=tmp_path / "probe")
    assert probe.steps == 2
    assert all(isinstance(score, RetrievalScore) for score in probe.teachers[0].student_scores.values())


def probe_of(*students: Score) -> Probe:
    teachers = (
        ProbedTeacher(teacher=str(number), teacher_scores={"x": zero_shot(1)}, student_scores={"x": score})
        for number, score in enumerate(students)
    )
    return Probe("resnet18", 200, tuple(teachers))


def test_teachers_whose_intervals_overlap_are_not_told_apart() -> None:
    assert probe_of(zero_shot(0.5), zero_shot(0.39)).is_certain()
    assert not probe_of(zero_shot(0.5), zero_shot(0.41)).is_certain()
    assert probe_of(zero_shot(0.5)).is_certain()


def retrieval(at1: float) -> RetrievalScore:
    recall = Recall(at1=at1, at5=None, at10=None)
    return RetrievalScore(task="captions", images=100, captions=100, image_to_text=recall, text_to_image=recall)


@pytest.mark.parametrize(
    ("first", "second", "is_certain"),
    [
        ((zero_shot(0.7), zero_shot(0.5)), (zero_shot(0.5), zero_shot(0.69)), False),
        ((zero_shot(0.9), zero_shot(0.5)), (zero_shot(0.5), zero_shot(0.69)), True),
        ((zero_shot(0.6), zero_shot(0.6)), (zero_shot(0.52), zero_shot(0.52)), True),  # neither alone would tell
        ((zero_shot(0.9), retrieval(0.1)), (zero_shot(0.1), retrieval(0.8)), False),
        ((retrieval(0.8),), (retrieval(0.5),), True),
    ],
)
def test_teachers_are_told_apart_by_the_mean_over_tasks_that_ranks_them(
    first: tuple[Score, ...], second: tuple[Score, ...], is_certain: bool
) -> None:
    students = [dict(zip("xy", scores, strict=False)) for scores in (first, second)]
    teachers = [ProbedTeacher(teacher=".", teacher_scores=scores, student_scores=scores) for scores in students]
    assert teachers[0].student_mean > teachers[1].student_mean
    assert Probe("resnet18", 200, tuple(teachers)).is_certain() is is_certain


def test_each_teacher_has_a_folder_of_its_own() -> None:
    names = ["ViT-B-16@laion400m_e32", "local-dir:a/b", "local-dir:a-b", "../.."]
    assert probing._folders(names) == ["ViT-B-16@laion400m_e32", "local-dir-a-b-2", "local-dir-a-b-3", "4"]
    assert probing._folders(["a b", "a/b", "a-b-2", "a-b-2-3"]) == ["a-b-1", "a-b-2", "a-b-2-3", "a-b-2-3-4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, "There is no task to rank the teachers by"),
        ({"teachers": []}, "There are no teachers to rank"),
        ({"teachers": ["a", "b", "a"]}, "The teacher a is named 2 times"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    source: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    options = {**source, "tasks": str(source["data"]), "output": tmp_path / "probe", **change}
    with pytest.raises(UsageError, match=message):
        edge.probe_teachers(**options)
    assert not (tmp_path / "probe").exists()


def test_several_processes_are_refused_before_anything_else(
    source: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="ranked by a single process, but 2 were started") as error:
        edge.probe_teachers(**source, tasks=str(tmp_path / "missing"), output=tmp_path / "probe")
    assert error.value.hint == "its runs are short: start it without torchrun"
    assert not (tmp_path / "probe").exists()
    assert "global_logits" not in {parameter.name for parameter in command.params}


def test_the_command_prints_a_table_or_json(command_line: Run, source: dict[str, Any], tmp_path: Path) -> None:
    names = ("teachers", "data", "student")
    options = [
        part for name, value in source.items() if name not in names for part in (f"--{name.replace('_', '-')}", value)
    ]
    arguments = (*source["teachers"], "--data", source["data"], "--student", "test_resnet", *options)
    arguments = ("probe-teachers", *arguments, "--task", source["data"], "-o", tmp_path / "probe")
    code, output, error = command_line(*map(str, arguments))
    assert (code, "Teacher's own" in output) == (0, True), error
    assert "the first two are within the error of these images" in error
    code, output, _ = command_line(*map(str, arguments), "--json")
    assert code == 0
    assert [teacher["teacher"] for teacher in json.loads(output)["teachers"]]


def test_each_teacher_has_a_store_of_its_own(source: dict[str, Any], evaluations: list[str], tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    probe = edge.probe_teachers(
        **source, tasks=str(source["data"]), output=tmp_path / "probe", teacher_cache=stores, views=1
    )
    assert len(probe.teachers) == 2
    assert [path.parent.name[-9:] for path in sorted(stores.glob(f"*/{MANIFEST}"))] == ["teacher-0", "teacher-1"]
