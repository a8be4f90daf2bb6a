"""What is drawn of a run at each evaluation: its plots, and the student's predictions for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from tiny_runs import tiny_run

from clip_rd_edge.data.tasks import Task, load_task
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.models.load import load_clip


@pytest.fixture
def config(pairs_csv: Path) -> RunConfig:
    return tiny_run("clip", {"steps": 4, "batch_size": 6}, data=str(pairs_csv), evaluate_every=2)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    for colour in ("red", "lime", "blue"):
        (tmp_path / "task" / colour).mkdir(parents=True)
        Image.new("RGB", (40, 40), colour).save(tmp_path / "task" / colour / "a.png")
    return load_task(str(tmp_path / "task"))


def test_tensorboard_gets_the_predictions_of_each_evaluation_and_no_weight_changes(
    config: RunConfig, task: Task, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options: dict[str, Any] = {"evaluate": lambda _: {"task": 0.5}, "tasks": [task]}
    plain = run_distillation(config, tmp_path / "plain", resume=False)
    shown = run_distillation(
        msgspec.structs.replace(config, report_to="tensorboard"), tmp_path / "shown", resume=False, **options
    )
    events = EventAccumulator(str(tmp_path / "shown" / "tensorboard")).Reload()
    assert [event.step for event in events.Images("predictions")] == [2, 4]
    assert (tmp_path / "shown" / "report" / "predictions.png").is_file()
    for one, other in zip(*(load_clip(str(run)).model.state_dict().values() for run in (plain, shown)), strict=True):
        assert torch.equal(one, other)
