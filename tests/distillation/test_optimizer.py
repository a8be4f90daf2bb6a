from __future__ import annotations

import math

import msgspec
import pytest
import torch

from clip_rd_edge.distillation.config import load_recipe
from clip_rd_edge.distillation.optimizer import MAX_CONSECUTIVE_SKIPS, RunOptimizer, average_decay_at
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


def test_the_moving_average_follows_its_definition_and_a_short_run_forgets_its_initial_weights() -> None:
    model, expected = Tiny(), 0.0
    run = optimizer(model, ema_decay=0.999, learning_rate=1e-12)
    first = 1.0  # the share of the first weights
    for step in range(300):
        with torch.no_grad():
            model.weight.fill_(float(step**2))
        run.apply(step, torch.tensor(1.0))
        decay = 0.0 if step == 0 else average_decay_at(step, 0.999)
        expected = decay * expected + (1 - decay) * step**2
        first *= decay if step else 1
    assert run.model_to_save.get_parameter("weight").item() == pytest.approx(expected, rel=1e-5)
    assert first < 1e-6


def test_a_resumed_optimizer_has_the_moving_average_the_loss_scale_and_the_skipped_steps() -> None:
    options = {"ema_decay": 0.9, "precision": "fp16"}
    model = Tiny()
    run = optimizer(model, **options)
    (model.weight * math.inf).sum().backward()
    run.apply(0, torch.tensor(1.0))  # an overflow halves the scale
    model.weight.grad = torch.ones(1)
    run.apply(1, torch.tensor(1.0))
    resumed = optimizer(Tiny(), **options)
    assert resumed.loss_scale != run.loss_scale
    resumed.load_state_dict(run.state_dict())
    assert (resumed.loss_scale, resumed.skipped) == (run.loss_scale, 1)
    average, expected = (r.model_to_save.get_parameter("weight").item() for r in (resumed, run))
    assert average == expected != 0


def test_the_logit_scale_is_clamped_to_100() -> None:
    model = Tiny()
    run = optimizer(model)
    for value, expected in ((9.0, 100.0), (-3.0, 1.0)):
        with torch.no_grad():
            model.logit_scale.fill_(value)
        run.apply(0, torch.tensor(1.0))
        assert model.logit_scale.exp().item() == pytest.approx(expected, rel=1e-5)


def test_clipping_and_the_logged_norm_apply_to_the_true_gradient() -> None:
    model = Tiny()
    run = optimizer(model, precision="fp16", clip_gradient_norm=1.0)
    model.weight.grad = torch.full((1,), 3.0 * run.loss_scale)
    run.apply(0, torch.tensor(1.0))
    assert run.gradient_norm == pytest.approx(3.0)


def test_any_number_of_lone_steps_may_be_skipped_and_any_in_a_row_in_search_of_a_loss_scale() -> None:
    model = Tiny()
    run = optimizer(model)
    for step in range(0, 2 * MAX_CONSECUTIVE_SKIPS + 2, 2):
        for number, loss in ((step, math.nan), (step + 1, 1.0)):
            model.weight.grad = torch.ones(1)
            run.apply(number, torch.tensor(loss))
            assert run.is_sound == math.isfinite(loss)
    assert run.skipped == MAX_CONSECUTIVE_SKIPS + 1

    searching = optimizer(model, precision="fp16")  # the search for a loss scale skips some in a row
    for step in range(2 * MAX_CONSECUTIVE_SKIPS):
        (model.weight * math.inf).sum().backward()
        searching.apply(step, torch.tensor(1.0))
    assert searching.skipped == 2 * MAX_CONSECUTIVE_SKIPS


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (1.0, math.nan)])
def test_a_step_that_is_not_finite_leaves_the_weights_as_they_are(loss: float, gradient: float) -> None:
    model = Tiny()
    run = optimizer(model)
    model.weight.grad = torch.full((1,), gradient)
    run.apply(0, torch.tensor(loss))
    assert (model.weight.item(), run.skipped, model.weight.grad) == (0.0, 1, None)
