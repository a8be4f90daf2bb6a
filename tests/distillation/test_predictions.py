"""What is drawn of a run at each evaluation: its plots, and the student's predictions for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from support import save_tiny_teacher
from tiny_runs import tiny_run

from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.tasks import RetrievalTask, Task, load_task
from clip_rd_edge.distillation import metrics as predictions
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.metrics import Prediction, Predictions
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.models.encoder import TorchEncoder
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


@pytest.mark.parametrize("source", ["pairs", "classes", "captions"])
def test_an_image_has_its_own_text_and_those_of_its_task_to_choose_from(
    source: str, config: RunConfig, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = save_tiny_teacher(tmp_path / "student")
    pairs, retrieval = load_pairs(str(config.data)), load_task(str(config.data))
    assert isinstance(retrieval, RetrievalTask)
    plotted = list[list[Prediction]]()
    monkeypatch.setattr(predictions, "plot_predictions", lambda found, path: plotted.append(found))
    chosen = {"pairs": None, "classes": task, "captions": retrieval}[source]
    for _ in range(2):
        Predictions(chosen, pairs, TorchEncoder(load_clip(str(student)))).plot(tmp_path / "predictions.png")
    first, second = plotted
    assert [row[1:] for row in first] == [row[1:] for row in second]
    if source == "classes":
        assert {(row.right, row.image.getpixel((0, 0))) for row in first} == {
            ("red", (255, 0, 0)), ("lime", (0, 255, 0)), ("blue", (0, 0, 255)),
        }  # fmt: skip
        assert {row.found for row in first} <= {"red", "lime", "blue"}
    else:
        own = {pairs.read(index).captions[0]: pairs.read(index).image().tobytes() for index in range(len(pairs))}
        assert len(first) == 12
        assert all(row.image.tobytes() == own[row.right] for row in first)
        assert {row.found for row in first} <= {row.right for row in first}
