"""What is settled before a run begins: batch, precision, steps, what is held back, and what not to score it on."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from support import Watch
from tiny_runs import tiny_run

import clip_rd_edge as edge
from clip_rd_edge.bundle.runs import RUN_CONFIG_FILE, read_metrics
from clip_rd_edge.data.tasks import ZeroShotTask
from clip_rd_edge.distillation import speed
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.setup import fitting_batch, load_setup, note_overlap
from clip_rd_edge.distillation.speed import (
    Speed,
    _choose,
    measure_speed,
    with_measured_precision,
    with_steps_for,
)
from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils.structs import to_yaml


def test_a_batch_has_at_most_as_many_pairs_as_there_are(pairs_csv: Path) -> None:
    rows = len(pairs_csv.read_text().splitlines()) - 1
    assert fitting_batch(tiny_run("clip", {"batch_size": 1024}, data=str(pairs_csv))) == rows
    assert fitting_batch(tiny_run("clip", {"batch_size": 4}, data=str(pairs_csv))) == 4
    assert fitting_batch(tiny_run("clip", {"batch_size": 1024}, data="a/{000..012}.tar")) == 1024  # which is not read


def test_measuring_the_speed_leaves_nothing(pairs_csv: Path, tmp_path: Path) -> None:
    speed = measure_speed(tiny_run("clip", {"batch_size": 4}, data=str(pairs_csv)), tmp_path / "runs" / "first")
    assert 0 < speed.seconds_per_step < speed.spent_s
    assert not list((tmp_path / "runs").iterdir())


def test_a_run_keeps_the_steps_that_it_began_with(
    pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run("clip", {"batch_size": 4, "steps": 7}, data=str(pairs_csv))
    monkeypatch.setattr(speed, "measure_speed", lambda *_, **__: Speed(0.5, 0))
    assert with_steps_for(config, tmp_path, 0.01).recipe.steps == 72
    (tmp_path / RUN_CONFIG_FILE).write_text(to_yaml(config))
    assert with_steps_for(msgspec.structs.replace(config, seed=1), tmp_path, 0.02).recipe.steps == 7


def test_images_that_are_trained_on_are_found_in_a_task_by_content(pairs_csv: Path, tmp_path: Path) -> None:
    pictures = sorted((pairs_csv.parent / "pictures").iterdir())
    shutil.copy(pictures[0], tmp_path / f"renamed{pictures[0].suffix}")
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "new.png")
    config = tiny_run("clip", {}, data=str(pairs_csv))
    for name, said in ((f"renamed{pictures[0].suffix}", 1), ("new.png", 0)):
        task = ZeroShotTask(name="task", images=(tmp_path / name,), targets=(0,), labels=("a", "b"))
        reporter = Watch()
        note_overlap(config, [task], reporter=reporter)
        assert len(reporter.noted) == said


def test_what_is_held_back_is_evaluated_and_not_trained_on(pairs_csv: Path, tmp_path: Path) -> None:
    options = {
        "data": pairs_csv, "student": "test_resnet", "recipe": "clip", "image_size": 48, "text": "64x1", "steps": 2,
        "context_length": 12, "precision": "fp32", "workers": 0, "hold_out": 0.25,
    }  # fmt: skip
    run = edge.distill(output=tmp_path / "run", **options)
    assert any(key.startswith("evaluation/") for key in read_metrics(run)[-1])
    held = [path for path in (run / "data" / "held-out").rglob("*") if path.is_file()]
    assert held
    assert edge.distill(output=run, resume=True, **options) == run
    with pytest.raises(UsageError) as refused:
        edge.distill(output=tmp_path / "other", **{**options, "templates": "a {}"})
    assert refused.value.option == "hold_out"
    assert not (tmp_path / "other").exists()


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "times", "expected"),
    [
        (CPU, {"fp32": 100, "bf16": 96}, "fp32"),
        (CUDA, {"fp32": 100, "bf16": 50, "fp16": 49}, "bf16"),
        (CUDA, {"fp32": 100, "bf16": 300, "fp16": 40}, "fp16"),  # bfloat16 is emulated
    ],
)
def test_fewer_bits_are_taken_only_if_they_are_noticeably_faster(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, times: dict[str, float], expected: str
) -> None:
    arrays = {name: np.asarray([value, 2 * value]) for name, value in times.items()}
    monkeypatch.setattr(speed, "time_in_turn", lambda calls, **_: {name: arrays[name] for name in calls})
    assert _choose("auto", lambda name: lambda: None, "a step", device)[0] == expected


def test_a_measured_model_has_the_weights_statistics_and_gradients_of_before(pairs_csv: Path) -> None:
    config = tiny_run("clip", {"batch_size": 4, "precision": "auto"}, data=str(pairs_csv))
    setup, watch = load_setup(config, name="student", processes=Processes()), Watch()
    before = {name: value.clone() for name, value in setup.student.model.state_dict().items()}
    measured = with_measured_precision(config, setup, Processes(), watch)
    assert measured.recipe.precision in ("fp32", "bf16")
    assert "measured" in watch.noted[-1]
    assert all(torch.equal(value, before[name]) for name, value in setup.student.model.state_dict().items())
    assert all(p.grad is None for p in [*setup.student.model.parameters(), *setup.objective.parameters()])
