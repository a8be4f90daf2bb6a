"""Complete runs of a few steps with tiny random models."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from support import Watch, save_tiny_teacher, write_pairs, write_shards
from tiny_runs import assert_same_weights, stop_at, tiny_run, weights

from clip_rd_edge.bundle.encoder import Encoder
from clip_rd_edge.bundle.runs import read_metrics
from clip_rd_edge.data.tasks import load_task
from clip_rd_edge.distillation.checkpoint import list_checkpoints
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.errors import (
    DiskFullError,
    DivergedRunError,
    InputError,
    UsageError,
)
from clip_rd_edge.losses import terms
from clip_rd_edge.losses.terms import Term
from clip_rd_edge.models.load import load_clip, save_clip, training_facts
from clip_rd_edge.utils.structs import read_yaml

STEPS = 8


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_tiny_teacher(tmp_path / "teacher")


def run_on(pairs: Path, teacher: Path) -> RunConfig:
    recipe = {"steps": STEPS, "batch_size": 6, "learning_rate": 1e-3}
    settings = {"student": "test_vit", "image_size": 48, "checkpoint_every": 3}
    return tiny_run("clip-rd", recipe, data=str(pairs), teacher=str(teacher), **settings)


@pytest.fixture
def config(pairs_csv: Path, teacher: Path) -> RunConfig:
    return run_on(pairs_csv, teacher)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of a run with `config` that nothing interrupted: do not change it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return distil(run_on(write_pairs(folder), save_tiny_teacher(folder / "teacher")), folder / "run")


def fine_tuning(config: RunConfig, model: Path, **changes: Any) -> RunConfig:
    """Return a run that trains a trained model, of whatever shape that is."""
    of_model = {"image_size": None, "context_length": None, "text": None, **changes}
    return msgspec.structs.replace(config, student=f"local-dir:{model}", **of_model)


def with_recipe(config: RunConfig, **recipe: object) -> RunConfig:
    return msgspec.structs.replace(config, recipe=msgspec.structs.replace(config.recipe, **recipe))


def distil(
    config: RunConfig, run: Path, *, resume: bool = False, on_step: Callable[[int], None] = lambda step: None
) -> Path:
    return run_distillation(config, run, resume=resume, reporter=Watch(on_step=on_step))


def test_a_run_writes_metrics_provenance_and_plots(config: RunConfig, tmp_path: Path, plots: None) -> None:
    student = distil(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {"loss/vrd_kl", "loss/xrd", "teacher_gap", "student_gap", "data_wait"} <= lines[0].keys()
    assert lines[-1]["loss"] < lines[0]["loss"]
    record = msgspec.json.decode((student / "distillation.json").read_bytes())
    assert (record["recipe"], record["pairs"], record["teacher"]) == ("clip-rd", 24, "teacher")
    assert {path.name for path in (tmp_path / "run" / "report").iterdir()} >= {"losses.png", "geometry.png"}


def test_a_secret_in_the_address_of_the_data_is_in_no_file_that_is_published(
    config: RunConfig, pairs_csv: Path, tmp_path: Path
) -> None:
    write_shards(pairs_csv)
    run, watch = tmp_path / "run", Watch()
    config = msgspec.structs.replace(config, data=f"pipe:TOKEN=SECRET cat {shlex.quote(str(tmp_path))}/{{0..2}}.tar")
    student = run_distillation(config, run, resume=False, reporter=watch)
    with_secret = [path for path in run.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]
    assert with_secret == [run / "config.yaml"]  # which --resume needs
    record = msgspec.json.decode((student / "distillation.json").read_bytes())
    assert record["data"] == record["configuration"]["data"] == training_facts(str(run))["data"] == "{0..2}.tar"
    assert "SECRET" not in " ".join(watch.noted)
    with pytest.raises(UsageError) as refusal:
        distil(msgspec.structs.replace(config, data=str(tmp_path / "1.tar")), run, resume=True)
    assert "SECRET" not in f"{refusal.value} {refusal.value.hint}"


def test_a_killed_run_resumes_to_the_same_weights_and_stays_as_it_is(
    config: RunConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    for number in (2, 5):  # before the first checkpoint, and after it
        with pytest.raises(MemoryError):
            distil(config, tmp_path / "killed", resume=number > 2, on_step=stop_at(number))
    resumed = distil(config, tmp_path / "killed", resume=True)
    assert_same_weights(resumed, uninterrupted)
    assert [line["step"] for line in read_metrics(tmp_path / "killed")] == list(range(1, STEPS + 1))
    written_at = (resumed / "open_clip_model.safetensors").stat().st_mtime_ns
    assert distil(config, tmp_path / "killed", resume=True) == resumed
    assert (resumed / "open_clip_model.safetensors").stat().st_mtime_ns == written_at


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(
    config: RunConfig, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, save = tmp_path / "run", torch.save

    def fail(state: object, file: IO[bytes]) -> None:
        if len(list_checkpoints(run)) == 1:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(DiskFullError, match="step 3"):
        distil(config, run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-3"]  # nothing half-written
    monkeypatch.undo()
    monkeypatch.setattr("clip_rd_edge.distillation.run.plot_run", lambda *_: None)
    assert_same_weights(distil(config, run, resume=True), uninterrupted)


def test_a_damaged_checkpoint_is_skipped_and_named(config: RunConfig, uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted.parent, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    state = list_checkpoints(tmp_path / "run")[-1] / "state.pt"
    content = bytearray(state.read_bytes())
    content[int(0.9 * len(content))] ^= 1
    state.write_bytes(content)
    watch = Watch()
    resumed = run_distillation(config, tmp_path / "run", resume=True, reporter=watch)
    assert any("step-8: state.pt does not match its checksum" in sentence for sentence in watch.noted)
    assert_same_weights(resumed, uninterrupted)
    shutil.rmtree(resumed)
    for folder in list_checkpoints(tmp_path / "run"):
        (folder / "state.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="checkpoint"):
        distil(config, tmp_path / "run", resume=True)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(
    config: RunConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    refused = []

    def start_another(step: int) -> None:
        for resume in (False, True):
            with pytest.raises(UsageError, match=f"being written by another run, process {os.getpid()}") as error:
                distil(config, tmp_path / "run", resume=resume)
            refused.append(error.value)

    student = distil(config, tmp_path / "run", on_step=start_another)
    assert len(refused) == 2 * STEPS
    assert not (tmp_path / "run" / ".lock").exists()
    assert_same_weights(student, uninterrupted)


def test_a_run_whose_inputs_were_replaced_is_resumed_only_when_that_is_accepted(
    config: RunConfig, pairs_csv: Path, tmp_path: Path
) -> None:
    with pytest.raises(MemoryError):
        distil(config, tmp_path / "run", on_step=stop_at(4))
    pairs_csv.write_text(pairs_csv.read_text().replace("number", "image"))
    difference = "has as many samples, but other names, captions, sizes or another order"
    with pytest.raises(UsageError, match=difference):
        distil(config, tmp_path / "run", resume=True)
    watch = Watch(on_step=stop_at(5))
    with pytest.raises(MemoryError):
        run_distillation(config, tmp_path / "run", resume=True, accept_changes=True, reporter=watch)
    assert any(difference in sentence for sentence in watch.noted)
    distil(config, tmp_path / "run", resume=True)  # with the inputs that were accepted


def spoil_an_image(config: RunConfig) -> Path:
    image = next(Path(str(config.data)).parent.rglob("*.png"))
    image.rename(image.with_suffix(".good"))
    image.write_bytes(b"no image")
    return image


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing_for_the_corrected_command(
    config: RunConfig, tmp_path: Path
) -> None:
    config = msgspec.structs.replace(config, max_bad=0.0, checkpoint_every=100)
    image = spoil_an_image(config)
    (tmp_path / "empty").mkdir()
    for run in (tmp_path / "run", tmp_path / "empty"):
        with pytest.raises(InputError, match="1 of "):
            distil(config, run)
    assert not (tmp_path / "run").exists()
    assert not any((tmp_path / "empty").iterdir())
    image.with_suffix(".good").rename(image)
    with pytest.raises(MemoryError):
        distil(config, tmp_path / "run", on_step=stop_at(1))
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_plots_that_cannot_be_drawn_cost_no_student(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plot(*_: object) -> None:
        assert (tmp_path / "run" / "student").is_dir()  # whatever may happen now, such as a kill
        raise ValueError("no font was found")

    monkeypatch.setattr("clip_rd_edge.distillation.run.plot_run", plot)
    watch = Watch()
    student = run_distillation(config, tmp_path / "run", resume=False, reporter=watch)
    load_clip(f"local-dir:{student}")
    assert watch.noted[-1] == f"the plots in {tmp_path / 'run' / 'report'} could not be drawn: no font was found"


def test_a_run_is_resumed_from_another_working_directory(
    config: RunConfig, pairs_csv: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, inner = tmp_path / "run", tmp_path / "inner"
    inner.mkdir()
    (inner / "other.csv").write_text("\n".join(pairs_csv.read_text().splitlines()[:20]).replace("pict", "../pict"))
    here = msgspec.structs.replace(config, data=pairs_csv.name, teacher="teacher")
    there = msgspec.structs.replace(config, data=f"../{pairs_csv.name}", teacher="../teacher")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MemoryError):
        distil(here, run, on_step=stop_at(4))
    monkeypatch.chdir(inner)
    other = msgspec.structs.replace(there, data="other.csv")
    for _ in ("unfinished", "finished"):
        with pytest.raises(UsageError, match="19 pairs, in place of 24 pairs"):
            distil(other, run, resume=True)
        assert_same_weights(distil(there, run, resume=True), uninterrupted)
        recorded = read_yaml(run / "config.yaml", RunConfig)
        assert (recorded.data, recorded.teacher) == (there.data, there.teacher)


def test_what_a_killed_save_left_is_removed_when_the_run_is_resumed(config: RunConfig, tmp_path: Path) -> None:
    run, number = tmp_path / "run", "0" * 32
    with pytest.raises(MemoryError):
        distil(config, run, on_step=stop_at(4))
    leftovers = [run / "checkpoints" / f".step-4.{number}.tmp", run / f".student.{number}.tmp"]
    for leftover in leftovers:
        leftover.mkdir()
        (leftover / "state.pt").touch()
    (run / "checkpoints" / "step-3").rename(run / "checkpoints" / f".step-3.{number}.old")  # between two renames
    watch = Watch()
    run_distillation(config, run, resume=True, reporter=watch)
    assert ("training", 4, STEPS) in watch.updates
    assert ("training", 1, STEPS) not in watch.updates
    assert not list(run.rglob(".*"))


def test_all_files_of_a_student_follow_the_umask(teacher: Path, tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        save_clip(tmp_path / "saved", load_clip(str(teacher)), provenance={})
    finally:
        os.umask(previous)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()} == {0o640}


def test_a_folder_in_use_or_of_another_run_is_rejected(config: RunConfig, tmp_path: Path) -> None:
    distil(with_recipe(config, steps=1), tmp_path / "run")
    (tmp_path / "mine" / "student").mkdir(parents=True)
    with pytest.raises(UsageError, match="not empty"):
        run_distillation(config, tmp_path / "mine", resume=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["student"]
    with pytest.raises(UsageError, match="seed: 0 → 1"):
        distil(msgspec.structs.replace(with_recipe(config, steps=1), seed=1), tmp_path / "run", resume=True)


def test_a_loss_that_is_never_finite_ends_a_run_of_few_steps_without_a_student(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    term = Term("xrd", lambda products: products.student().rows.sum() * math.nan, frozenset({"teacher"}), False)
    monkeypatch.setitem(terms._TERMS, "xrd", term)
    with pytest.raises(DivergedRunError):
        distil(with_recipe(config, steps=2), tmp_path / "run")
    assert read_metrics(tmp_path / "run")[0]["loss"] is None
    assert not (tmp_path / "run" / "student").exists()


def test_a_run_that_diverges_keeps_its_last_good_checkpoint_and_says_so(config: RunConfig, tmp_path: Path) -> None:
    recipe = msgspec.structs.replace(config.recipe, steps=4, learning_rate=1e6)
    config = msgspec.structs.replace(config, recipe=recipe, checkpoint_every=1)
    for resume in (False, True):  # the same run to the same end
        with pytest.raises(DivergedRunError, match="step-1"):
            distil(config, tmp_path / "run", resume=resume)
        assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-1"]
    assert not (tmp_path / "run" / "student").exists()


def test_the_saved_student_is_between_its_start_and_the_trained_weights(
    config: RunConfig, teacher: Path, tmp_path: Path
) -> None:
    tuned = fine_tuning(with_recipe(config, steps=2), teacher)
    start, end = weights(teacher), weights(distil(tuned, tmp_path / "run"))
    scores = iter([0.1, 0.3])  # of the trained weights, then of those that are saved
    student = run_distillation(
        msgspec.structs.replace(tuned, tuned_share=0.25),
        tmp_path / "between",
        resume=False,
        evaluate=lambda _: {"task": next(scores)},
    )
    assert json.loads((student / "distillation.json").read_text())["evaluation"] == {"task": 0.3}
    between = weights(student)
    for name, tensor in between.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.75 * start[name] + 0.25 * end[name])


def test_the_best_student_is_saved_in_addition_to_the_last_and_evaluations_are_shown_and_change_no_weight(
    config: RunConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    for colour in ("red", "lime", "blue"):
        (tmp_path / "task" / colour).mkdir(parents=True)
        Image.new("RGB", (40, 40), colour).save(tmp_path / "task" / colour / "a.png")
    config = msgspec.structs.replace(config, evaluate_every=3, report_to="tensorboard")
    scores = iter([0.2, 0.5, 0.4])
    options: dict[str, Any] = {
        "evaluate": lambda _: {"task": next(scores)},
        "tasks": [load_task(str(tmp_path / "task"))],
    }
    assert_same_weights(run_distillation(config, tmp_path / "run", resume=False, **options), uninterrupted)
    best, last = (
        json.loads((tmp_path / "run" / name / "distillation.json").read_text()) for name in ("best", "student")
    )
    assert (best["steps"], best["evaluation"]) == (6, {"task": 0.5})
    assert (last["steps"], last["evaluation"]) == (STEPS, {"task": 0.4})
    assert load_clip(str(tmp_path / "run" / "best")).embedding_size == 24

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("evaluation/task")] == [3, 6, STEPS]
    logged = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(logged)
    assert [event.step for event in events.Images("predictions")] == [3, 6, STEPS]
    assert (tmp_path / "run" / "report" / "predictions.png").is_file()


def test_a_run_ends_early_where_its_evaluations_get_no_better(config: RunConfig, tmp_path: Path) -> None:
    config = msgspec.structs.replace(config, evaluate_every=2, patience=2)
    scores = iter([0.2, 0.5, 0.4, 0.5])
    evaluate = lambda _: {"task": next(scores, 0.5)}  # noqa: E731
    student = run_distillation(with_recipe(config, steps=20), tmp_path / "run", resume=False, evaluate=evaluate)
    records = [json.loads((path / "distillation.json").read_text()) for path in (student, tmp_path / "run" / "best")]
    assert [record["steps"] for record in records] == [8, 4]
    assert records[0]["evaluation"] == {"task": 0.5}
    shutil.rmtree(student)  # as if it was killed before it was written
    run_distillation(with_recipe(config, steps=20), tmp_path / "run", resume=True, evaluate=evaluate)
    assert json.loads((student / "distillation.json").read_text())["steps"] == 8


def test_an_evaluation_that_fails_loses_no_step(config: RunConfig, tmp_path: Path) -> None:
    def fail(_: object) -> dict[str, float]:
        raise InputError("The image cannot be read.")

    config = with_recipe(config, steps=2)
    with pytest.raises(InputError, match="The image cannot be read"):
        run_distillation(config, tmp_path / "run", resume=False, evaluate=fail)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-2"]
    watch = Watch()
    run_distillation(config, tmp_path / "run", resume=True, reporter=watch, evaluate=lambda _: {"task": 0.5})
    assert "resumed after step 2 of 2" in watch.noted
    assert read_metrics(tmp_path / "run")[-1]["evaluation/task"] == 0.5


def test_the_moving_average_is_saved_and_evaluated(config: RunConfig, uninterrupted: Path, tmp_path: Path) -> None:
    def finite(encoder: Encoder) -> dict[str, float]:
        return {"finite": float(np.isfinite(encoder.encode_texts(["a cat"])).all())}

    with_average = msgspec.structs.replace(with_recipe(config, ema_decay=0.9), evaluate_every=4)
    averaged = run_distillation(with_average, tmp_path / "averaged", resume=False, evaluate=finite)
    assert [line.get("evaluation/finite") for line in read_metrics(tmp_path / "averaged")][3::4] == [1.0, 1.0]
    start = distil(with_recipe(config, steps=1, learning_rate=1e-12), tmp_path / "start")
    name = "visual.head.proj.weight"
    initial, final, average = (weights(path)[name] for path in (start, uninterrupted, averaged))
    assert 0 < (average - initial).norm() < (final - initial).norm()
