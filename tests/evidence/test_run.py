from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image
from support import Watch, save_tiny_teacher

from clip_rd_edge.benchmarking.accuracy import zero_shot
from clip_rd_edge.bundle.runs import INPUTS_FILE, STUDENT_FOLDER, WEIGHTS_FILE
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.tasks import load_task
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.embed import STORE_STAGE
from clip_rd_edge.distillation.optimizer import diverged_error
from clip_rd_edge.distillation.setup import data_inputs
from clip_rd_edge.errors import DivergedRunError, UsageError
from clip_rd_edge.evidence import run as runs
from clip_rd_edge.evidence.report import read_evidence_file
from clip_rd_edge.evidence.run import evaluate_model, run_config
from clip_rd_edge.evidence.suite import Curve, EvidenceSuite
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.utils.files import write_text
from clip_rd_edge.utils.outputs import exclusive_writer
from clip_rd_edge.utils.paths import Typed
from clip_rd_edge.utils.structs import to_yaml
from clip_rd_edge.utils.text import SILENT, Reporter

COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta")


@pytest.fixture
def squares_suite(suite: EvidenceSuite, pairs_csv: Path, tmp_path: Path) -> EvidenceSuite:
    """The small suite, on coloured squares."""
    for colour in COLOURS:
        (tmp_path / "squares" / colour).mkdir(parents=True)
        Image.new("RGB", (40, 40), colour).save(tmp_path / "squares" / colour / "one.png")
    tasks = (str(tmp_path / "squares"), str(pairs_csv))
    return replace(suite, data=str(pairs_csv), tasks=tasks, students=("test_resnet",))


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return str(save_tiny_teacher(tmp_path / "teacher"))


def test_a_second_writer_is_refused_and_a_task_that_is_trained_on_is_named(
    squares_suite: EvidenceSuite, tmp_path: Path
) -> None:
    with exclusive_writer(tmp_path / "out"), pytest.raises(UsageError, match="written by another run"):
        runs.run_evidence(squares_suite, tmp_path / "out", SILENT)
    watch = Watch()
    with pytest.raises(UsageError, match="no built-in teacher"):
        runs.run_evidence(squares_suite, tmp_path / "out", watch)
    assert ["both trained and evaluated on" in note for note in watch.noted] == [True]


def test_with_other_tasks_or_another_teacher_what_was_evaluated_is_evaluated_again(
    squares_suite: EvidenceSuite, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: RunConfig, run: Path, **_: object) -> Path:
        write_text(run / "config.yaml", to_yaml(config))
        write_text(run / "metrics.jsonl", '{"step": 1, "loss/task": 2.0, "evaluation/squares": 0.5}\n')
        return Path(teacher)

    monkeypatch.setattr(runs, "run_distillation", train)
    squares, pairs = squares_suite.tasks
    one_run = {"methods": squares_suite.methods[:1], "compare_with": (), "seeds": (0,)}
    first = replace(squares_suite, **one_run, tasks=(squares,))
    runs.run_evidence(first, tmp_path / "out", SILENT, teacher=teacher)
    both = replace(first, tasks=(pairs, squares))
    shutil.copytree(teacher, tmp_path / "other")
    evidence = runs.run_evidence(both, tmp_path / "out", SILENT, teacher=str(tmp_path / "other"))
    assert evidence.teacher.model == "other"
    assert [len(task.hits) for task in evidence.runs[0].result.tasks] == [len(load_task(pairs).images), 6]
    encoder = TorchEncoder(load_clip(teacher))
    curves = [runs.curve_scores(encoder, [load_task(name) for name in tasks]) for tasks in ((pairs,), (pairs, squares))]
    assert [list(scores) for scores in curves] == [["pairs"], ["squares"]]
    names = [[task.score.task for task in result.tasks] for result in (evidence.teacher, evidence.runs[0].result)]
    assert names == [["pairs", "squares"]] * 2
    assert evidence.runs[0].curves.keys() == {"loss/task", "evaluation/squares"}
    Image.new("RGB", (41, 40), "red").save(tmp_path / "squares" / "red" / "two.png")  # the same name, another task
    again = runs.run_evidence(both, tmp_path / "out", SILENT, teacher=str(tmp_path / "other"))
    assert [len(result.tasks[1].hits) for result in (again.teacher, again.runs[0].result)] == [7, 7]
    assert again.runs[0].curves.keys() == {"loss/task"}  # the other is that of the images before
    shutil.rmtree(tmp_path / "other")
    save_tiny_teacher(tmp_path / "other", seed=3)
    with pytest.raises(UsageError, match="finished runs beside another teacher, other, or one with other weights"):
        runs.run_evidence(both, tmp_path / "out", SILENT, teacher=str(tmp_path / "other"))
    assert runs.collect(both, tmp_path / "out") == again
    stale = tmp_path / "out" / next(iter(both.runs())).subfolder / "result.json"
    content = stale.read_text()
    for now, then in (('"pairs"', '"others"'), ('"content": "', '"content": "0')):  # of another suite, of other images
        assert now in content
        stale.write_text(content.replace(now, then))
        with pytest.raises(UsageError, match="no finished run"):
            runs.collect(both, tmp_path / "out")


def test_the_other_runs_are_trained_before_those_that_diverge_end_the_suite(
    squares_suite: EvidenceSuite, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, diverging = [], ["none", "clip-rd"]
    squares_tasks = [load_task(name) for name in squares_suite.tasks]

    def train(config: RunConfig, run: Path, **_: object) -> Path:
        begun.append((config.recipe_name, config.seed))
        if config.recipe_name in diverging and config.seed == 0:
            raise diverged_error(run, "the loss was not finite")
        write_text(run / "config.yaml", to_yaml(config))
        write_text(run / "metrics.jsonl", '{"step": 1, "loss/task": 2.0}\n')
        return Path(teacher)

    monkeypatch.setattr(runs, "run_distillation", train)
    measured = cache(lambda name: evaluate_model(TorchEncoder(load_clip(teacher)), squares_tasks, name=name))
    monkeypatch.setattr(runs, "evaluate_model", lambda encoder, tasks, *, name: measured(name))
    all_runs = [(run.method.name, run.seed) for run in squares_suite.runs()]
    for message in (
        "2 of 6 runs have diverged: test_resnet, none, seed 0; test_resnet, clip-rd, seed 0.",
        "1 of 6 runs has diverged: test_resnet, none, seed 0.",
    ):
        watch = Watch()
        with pytest.raises(DivergedRunError, match=f"^{message}$") as error:
            runs.run_evidence(squares_suite, tmp_path / "out", watch, teacher=teacher)
        assert (error.value.exit_code, begun) == (1, all_runs)
        assert error.value.hint.startswith("finished runs are kept: ")
        assert "The run has diverged: the loss was not finite; no checkpoint was written yet." in watch.noted
        written = read_evidence_file(tmp_path / "out" / "small.json")
        assert [(run.method, run.seed) for run in written.runs] == [
            (method, seed) for method, seed in all_runs if seed or method not in diverging
        ]
        diverging.pop()  # another machine rounds otherwise
        begun.clear()
    assert len(runs.run_evidence(squares_suite, tmp_path / "out", SILENT, teacher=teacher).runs) == 6


def test_a_run_is_measured_by_its_last_student_and_the_time_of_its_training(
    squares_suite: EvidenceSuite, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, scores = [0.0], list[dict[str, float]]()
    trained = str(save_tiny_teacher(tmp_path / "trained", seed=2))
    encoder = TorchEncoder(load_clip(trained))

    def train(
        config: RunConfig, run: Path, *, resume: bool, reporter: Reporter, evaluate: Callable[..., dict[str, float]]
    ) -> Path:
        assert resume
        lines = (
            {"step": 1, "loss/task": 2.0, "student_positive": 0.123456, "evaluation/squares": 0.5},
            {"step": 2, "loss/task": 1.0, "student_positive": 0.2, "loss": 9},
        )
        write_text(run / "metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
        for name in ("config.yaml", "checkpoints/1", "best/weights", "student/weights"):
            write_text(run / name, to_yaml(config))
        for stage, seconds in ((STORE_STAGE, 0), (STORE_STAGE, 8), ("training", 42)):  # the store is every run's
            now[0] += seconds
            reporter.update(stage, 1, 2)
        scores.append(evaluate(encoder))
        return Path(trained)

    monkeypatch.setattr(runs, "run_distillation", train)
    monkeypatch.setattr(runs.time, "process_time", lambda: now[0])
    suite = replace(squares_suite, methods=squares_suite.methods[:1], compare_with=())
    new, resumed = suite.runs()
    config = run_config(suite, resumed, teacher=teacher, stores=tmp_path / "out" / "store")
    write_text(tmp_path / "out" / resumed.subfolder / "config.yaml", to_yaml(config))
    evidence = runs.run_evidence(suite, tmp_path / "out", SILENT, teacher=teacher)
    assert [run.cpu_seconds for run in evidence.runs] == [42, None]
    task = load_task(suite.tasks[0])
    right = zero_shot(encoder, task).labels == np.asarray(task.targets)  # type: ignore[arg-type,union-attr]
    assert not right.all()
    for run, shown in zip(evidence.runs, scores, strict=True):
        assert run.result.tasks[0].hits == "".join("01"[int(hit)] for hit in right)
        assert shown == {"squares": right.mean()}
        assert run.curves == {
            "loss/task": Curve(steps=(1, 2), values=(2.0, 1.0)),
            "student_positive": Curve(steps=(1, 2), values=(0.1235, 0.2)),
            "evaluation/squares": Curve(steps=(1,), values=(0.5,)),
        }
    kept = {path.name for path in (tmp_path / "out" / new.subfolder).iterdir()}
    assert kept == {"config.yaml", "metrics.jsonl", "result.json", "student"}


def test_a_suite_is_checked_before_its_first_run(
    squares_suite: EvidenceSuite, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "run_distillation", lambda *_, **__: pytest.fail("a run has begun"))
    typo = replace(squares_suite, students=("test_resnet", "test_resnett"))
    with pytest.raises(UsageError, match="No student named 'test_resnett'"):
        runs.run_evidence(typo, tmp_path / "out", SILENT, teacher=teacher)
    unknown = replace(squares_suite.methods[2], text="runs/trimed")
    late = replace(squares_suite, methods=(*squares_suite.methods[:2], unknown))
    with pytest.raises(UsageError, match="The text tower is"):
        runs.run_evidence(late, tmp_path / "out", SILENT, teacher=teacher)


def test_a_finished_run_is_not_that_of_a_term_with_other_code(
    squares_suite: EvidenceSuite, teacher: str, pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run, *_) = squares_suite.runs()
    config, folder = run_config(squares_suite, run, teacher=Typed(teacher), stores=tmp_path), tmp_path / "run"
    pairs = load_pairs(Typed(str(pairs_csv)))
    (folder / STUDENT_FOLDER).mkdir(parents=True)
    (folder / STUDENT_FOLDER / WEIGHTS_FILE).touch()
    inputs = {**data_inputs(pairs), "terms_sha256": {"mine": "1" * 64}}
    (folder / INPUTS_FILE).write_text(json.dumps(inputs))
    monkeypatch.setattr(runs, "own_terms", lambda _: ["mine"])
    monkeypatch.setattr(runs, "source_of", lambda _: "1" * 64)
    runs._check_files(config, folder, pairs)
    monkeypatch.setattr(runs, "source_of", lambda _: "2" * 64)
    with pytest.raises(UsageError, match="term mine has other code"):
        runs._check_files(config, folder, pairs)


@pytest.mark.slow
def test_an_interrupted_suite_resumes(
    squares_suite: EvidenceSuite, teacher: str, tmp_path: Path, command_line: Callable[..., tuple[int, str, str]]
) -> None:
    folder, path = tmp_path / "out", tmp_path / "suite.yaml"
    path.write_text(to_yaml(squares_suite))
    first_seed = replace(squares_suite, seeds=(0,))
    evidence = runs.run_evidence(first_seed, folder, SILENT, teacher=teacher)
    assert [run.method for run in evidence.runs] == ["none", "clip-rd", "clip-rd-without-xrd"]
    full, without = evidence.runs[1:]
    assert full.curves["student_positive"].values != without.curves["student_positive"].values
    assert full.curves["teacher_positive"] == without.curves["teacher_positive"]  # they saw the same batches
    assert full.curves["evaluation/squares"].steps == (1, 2)
    assert {path.name for path in folder.glob("runs/*/*/*/*") if path.is_dir()} == {"student", "report"}

    # As if killed while the last run was evaluated: its student exists, its result does not.
    last = folder / "runs" / "test_resnet" / "clip-rd-without-xrd" / "seed-0"
    (last / "result.json").unlink()
    stamps = {file: file.stat().st_mtime_ns for file in (folder / "runs").rglob("*") if file.is_file()}
    code, output, error = command_line("evidence", "run", path, "--teacher", teacher, "-o", folder)
    assert code == 0, error
    assert output.startswith("All 6 runs are finished")
    assert stamps == {file: file.stat().st_mtime_ns for file in stamps}
    resumed = read_evidence_file(folder / "small.json")
    assert [run.seed for run in resumed.runs] == [0, 0, 0, 1, 1, 1]
    assert resumed.runs[2].result == without.result
    assert resumed.runs[2].cpu_seconds is None
    assert (folder / "small.md").read_text() == output
    for name in ("small-curves.png", "small-geometry.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

    other = replace(squares_suite, steps=3)
    with pytest.raises(UsageError, match="another configuration: steps: 2 → 3"):
        runs.run_evidence(other, folder, SILENT, teacher=teacher)
    other_weights = replace(squares_suite.methods[1], weights={"fd": 1})
    other = replace(squares_suite, methods=(other_weights,), compare_with=())
    with pytest.raises(UsageError, match=r"another configuration: objective\.fd"):
        runs.run_evidence(other, folder, SILENT, teacher=teacher)
