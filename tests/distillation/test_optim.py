from __future__ import annotations

import msgspec
import pytest
import torch

from clip_rd_edge.distillation.config import load_recipe
from clip_rd_edge.distillation.optim import RunOptimizer, average_decay_at
from clip_rd_edge.losses.objective import Objective, Weights


class Tiny(torch.nn.Module):
    """One weight and a logit scale, as every student has one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.0))


def optimizer(model: torch.nn.Module, **recipe: object) -> RunOptimizer:
    settings = msgspec.structs.replace(load_recipe("clip"), **recipe)
    return RunOptimizer(model, Objective(Weights(task=1)), settings, steps=10_000)


@pytest.mark.parametrize(("update", "expected"), [(0, 0.1), (1, 2 / 11), (89, 90 / 99), (100_000, 0.999)])
def test_the_decay_of_the_moving_average_starts_small(update: int, expected: float) -> None:
    assert average_decay_at(update, 0.999) == pytest.approx(expected)


def test_the_moving_average_of_a_short_run_forgets_the_initial_weights(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The share of the first weights in the average is what is left of 1 after updates with weights of 0."""
    model = Tiny()
    run = optimizer(model, ema_decay=0.999)
    for step in range(300):
        with torch.no_grad():
            model.weight.fill_(1.0 if step == 0 else 0.0)
        run.apply(step, 1.0, run=tmp_path)
    assert 0 <= run.model_to_save.get_parameter("weight").item() < 1e-6
