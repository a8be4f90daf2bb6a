"""AdamW with the recipe's groups, and its schedule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from clip_rd_edge.distillation.checkpoint import saved_states
from clip_rd_edge.distillation.config import Recipe
from clip_rd_edge.distillation.step import clamp_scales
from clip_rd_edge.errors import ClipRdEdgeError
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


# A few steps in a row without finite gradients mean that the run has diverged.
MAX_SKIPPED_IN_A_ROW = 5


class Update:
    """Optimiser, loss scale and moving average of a run.

    Attributes:
        loss_scale: what the loss is multiplied with before it goes back, so that float16 gradients do not vanish; 1
            in other precisions.
        learning_rate: of the last step.
        gradient_norm: of the last step, before clipping.
        skipped: steps that were not made since the start or resume.
    """

    def __init__(self, model: nn.Module, objective: Objective, recipe: Recipe, *, steps: int) -> None:
        self._model, self._objective, self._recipe, self._steps = model, objective, recipe, steps
        self._optimizer = build_optimizer(model, objective, recipe)
        self._parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        device = next(model.parameters()).device
        self._scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self._average: AveragedModel | None = None
        if recipe.ema_decay:
            average = get_ema_multi_avg_fn(recipe.ema_decay)  # type: ignore[no-untyped-call]
            # Buffers are copied, not averaged: a causal mask holds −inf, whose average with itself is not a number.
            self._average = AveragedModel(model, multi_avg_fn=average)
        self.learning_rate = self.gradient_norm = 0.0
        self.skipped = self._skipped_in_a_row = 0

    @property
    def loss_scale(self) -> float:
        """See the class."""
        one = torch.ones((), device=self._parameters[0].device)
        return float(self._scaler.scale(one)) if self._scaler.is_enabled() else 1.0

    @property
    def model_to_keep(self) -> nn.Module:
        """The model that is evaluated and saved: the moving average where there is one."""
        return self._average.module if self._average is not None else self._model

    def make(self, step: int, loss: float, *, run: Path) -> None:
        """Make step `step` (from 0) with the gradients that are there, and clear them.

        Raises:
            ClipRdEdgeError: loss or gradients were not finite for MAX_SKIPPED_IN_A_ROW steps.
        """
        self.learning_rate = learning_rate_at(step, self._steps, self._recipe)
        set_learning_rate(self._optimizer, self.learning_rate)
        scaled = self.loss_scale != 1.0
        self._scaler.unscale_(self._optimizer)  # before clipping, which is meant for the true gradients
        limit = self._recipe.clip_gradient_norm or math.inf
        self.gradient_norm = float(nn.utils.clip_grad_norm_(self._parameters, limit))
        finite = math.isfinite(loss) and math.isfinite(self.gradient_norm)
        if finite:
            self._scaler.step(self._optimizer)
            clamp_scales(self._model, self._objective)
            if self._average is not None:
                self._average.update_parameters(self._model)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._count(step, finite, overflow=scaled and math.isfinite(loss), run=run)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model and the objective themselves."""
        average = self._average.state_dict() if self._average is not None else None
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict(), "average": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])

    def _count(self, step: int, finite: bool, *, overflow: bool, run: Path) -> None:
        if finite:
            self._skipped_in_a_row = 0
            return
        self.skipped += 1
        if overflow and self.loss_scale > 1.0:
            return  # the scaler is finding its scale; that is not divergence
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            good = saved_states(run)
            last = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was written yet"
            raise ClipRdEdgeError(
                f"The loss was not finite for {self._skipped_in_a_row} steps in a row, up to step {step + 1}; {last}.",
                hint="try a lower learning rate, or precision: fp32",
            )
