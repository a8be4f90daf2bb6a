from __future__ import annotations

from typing import Any

import pytest

from clip_rd_edge.distillation.config import (
    Recipe,
    load_recipe,
    recipe_names,
    resolve,
)
from clip_rd_edge.distillation.optimizer import build_optimizer, learning_rate_at
from clip_rd_edge.losses.objective import Objective, Weights


def test_every_recipe_has_the_terms_of_its_method() -> None:
    kd = {"task": 1, "fd": 2000, "icl": 1, "hrd": 1}
    rd = {**kd, "vrd_kl": 1, "vrd_ce_image": 1, "vrd_ce_text": 1, "xrd": 1}
    methods = {
        "clip": {"task": 1},
        "clip-kd": kd,
        "clip-kd-bank": {**kd, "bank": 4},
        "clip-rd": rd,
        "clip-rd-bank": {**rd, "bank": 4},
        "clip-rd-paper": rd,
        "siglip-kd": {"sigmoid": 1, "fd": 2000, "icl": 1, "hrd": 1},
    }
    methods["tinyclip"] = {"task": 1, "affinity": 1}
    assert {name: dict(load_recipe(name).objective) for name in recipe_names()} == methods
    assert [load_recipe(name).scales for name in ("clip-rd", "clip-rd-paper")] == ["bounded", "raw"]


def test_the_schedule_is_a_warm_up_and_then_a_cosine() -> None:
    recipe = Recipe(objective=Weights(task=1), learning_rate=2.0, warmup_steps=10)
    rates = [learning_rate_at(step, 130, recipe) for step in range(130)]
    assert rates[:11] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1.2, 1.4, 1.6, 1.8, 2, 2])
    angles = (30, 45, 60, 90, 120, 135, 150)  # of 180 degrees in 120 steps
    cosines = [0.75**0.5, 0.5**0.5, 0.5, 0, -0.5, -(0.5**0.5), -(0.75**0.5)]
    assert [rates[10 + angle * 2 // 3] for angle in angles] == pytest.approx([1 + cosine for cosine in cosines])


def test_weight_decay_applies_to_matrices_but_not_to_vectors() -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    groups = build_optimizer(model, Objective(Weights(task=1, xrd=1)), load_recipe("clip-rd")).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.01]
    assert [len(group["params"]) for group in groups] == [1, 3, 3]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1e-3),
        ({"batch_size": 128}, 3.54e-4),
        ({"batch_size": 256, "learning_rate": 7e-4}, 7e-4),
        ({"batch_size": 256, "quantize": "int8"}, 1e-4),
    ],
)
def test_the_learning_rate_follows_the_batch_size_unless_it_is_given(options: Any, expected: float) -> None:
    config = resolve("clip-rd", data="pairs.csv", student="resnet18", **options)
    assert config.recipe.learning_rate == pytest.approx(expected)


def test_the_teachers_text_tower_is_frozen() -> None:
    assert resolve("clip-rd", data="d", student="s", teacher="t", text="teacher").freeze_text
    assert not resolve("clip-rd", data="d", student="s", teacher="t").freeze_text
