"""The precision of a run is chosen by timing, on every kind of device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support import tiny_clip

from clip_rd_edge.distillation import speed as precision
from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.speed import _choose_precision, _measure_precision, measured_precisions
from clip_rd_edge.distillation.step import StepSettings, TrainingStep
from clip_rd_edge.losses.objective import Objective, Weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """Return a function that chooses among given times in milliseconds, on a device that is not there."""

    def choose(device: torch.device, **times: float) -> tuple[str, str]:
        arrays = {name: np.asarray([value, 2 * value]) for name, value in times.items()}
        monkeypatch.setattr(precision, "time_in_turn", lambda calls, **_: {name: arrays[name] for name in calls})
        return _measure_precision({name: lambda: None for name in measured_precisions(device)}, "a step", device)

    return choose


@pytest.mark.parametrize(
    ("device", "times", "expected"),
    [
        (CPU, {"fp32": 100, "bf16": 96}, "fp32"),
        (CUDA, {"fp32": 100, "bf16": 50, "fp16": 49}, "bf16"),
        (CUDA, {"fp32": 100, "bf16": 300, "fp16": 40}, "fp16"),  # bfloat16 is emulated
    ],
)
def test_fewer_bits_are_taken_only_if_they_are_noticeably_faster(
    measured: Callable[..., tuple[str, str]], device: torch.device, times: dict[str, float], expected: str
) -> None:
    assert measured(device, **times)[0] == expected


def test_a_measured_model_has_the_weights_statistics_and_gradients_of_before() -> None:
    student, objective = tiny_clip(), Objective(Weights(task=1))
    before = {name: value.clone() for name, value in student.model.state_dict().items()}

    def make_step(autocast: torch.dtype | None) -> TrainingStep:
        return TrainingStep(student, None, objective, Processes(), StepSettings(autocast=autocast))

    batch = Batch(torch.randint(256, (4, 3, 32, 32)).byte(), (), ["a cat", "a dog", "a", "b"])
    _, reason = _choose_precision("auto", make_step, batch, CPU)
    assert "measured" in reason
    assert all(torch.equal(value, before[name]) for name, value in student.model.state_dict().items())
    assert all(parameter.grad is None for parameter in [*student.model.parameters(), *objective.parameters()])
