"""AdamW with the recipe's groups, and its schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from clip_rd_edge.distill.config import Recipe
from clip_rd_edge.losses.objective import Objective


def build_optimizer(model: nn.Module, objective: Objective, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over what requires gradients: matrices decay, vectors do not, the objective's scales a little."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Biases, norms' weights and the logit scale are the parameters of fewer than two dimensions (open_clip's rule).
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if objective.weights.need_teacher:
        groups.append({"params": list(objective.parameters()), "weight_decay": recipe.scales_weight_decay})
    # Fused: on a CPU the plain version takes a fifth of a small student's step.
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.epsilon, fused=True)


def learning_rate_at(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up from 0, then a cosine to 0 at the end; `step` counts from 0.

    The warm-up is the recipe's, but at most a tenth of the run, so that a short run is not all warm-up.
    """
    warmup = min(recipe.warmup_steps, steps // 10)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
