"""AdamW with the recipe's parameter groups and learning-rate schedule."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_rd_edge.distillation.checkpoint import list_checkpoints
from clip_rd_edge.distillation.config import Recipe
from clip_rd_edge.distillation.step import clamp_scales
from clip_rd_edge.errors import DivergedRunError, NotFiniteError
from clip_rd_edge.losses.objective import Objective


def build_optimizer(model: nn.Module, objective: Objective, recipe: Recipe) -> torch.optim.AdamW:
    """Build AdamW for the trainable parameters, in groups by weight decay: matrices, vectors, the objective's own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Biases, norm weights and the logit scale have fewer than two dimensions; they are not decayed (open_clip's rule).
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if objective.weights.needs_teacher:
        groups.append({"params": list(objective.parameters()), "weight_decay": recipe.scales_weight_decay})
    # Fused: on a CPU, the unfused version takes a fifth of a small student's step.
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.epsilon, fused=True)


def learning_rate_at(step: int, steps: int, recipe: Recipe) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up from 0, then cosine decay to 0.

    The warm-up is limited to a tenth of the run, so that a short run does not consist of warm-up only.
    """
    warmup = min(recipe.warmup_steps, steps // 10)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def average_decay_at(update: int, decay: float) -> float:
    """Return the decay of a moving average's update, counted from 0: min(decay, (1 + n) / (10 + n)).

    With a constant decay, the average of a short run would consist mostly of the random initial weights: a third of
    them would be left after 1,100 updates with 0.999. (The schedule of `tf.train.ExponentialMovingAverage`.)
    """
    return min(decay, (1 + update) / (10 + update))


# Several consecutive steps without finite gradients mean that the run has diverged.
MAX_CONSECUTIVE_SKIPS = 5


class RunOptimizer:
    """Optimiser, loss scale and moving average of a run.

    A step is computed, and skipped if need be, on the device alone: to read a number from a GPU is to wait for it.
    Methods that do so are documented as such.

    Attributes:
        learning_rate: of the last step.
        gradient_norm: of the last step, before clipping, on the device.
    """

    def __init__(self, model: nn.Module, objective: Objective, recipe: Recipe, *, steps: int) -> None:
        self._model, self._objective, self._recipe, self._steps = model, objective, recipe, steps
        self._optimizer = build_optimizer(model, objective, recipe)
        self._parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        device = next(model.parameters()).device
        self._scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self._average, self._averaged = copy.deepcopy(model) if recipe.ema_decay else None, 0  # models in the average
        self.learning_rate, self.gradient_norm = 0.0, torch.zeros((), device=device)
        # Of the skipped steps, all; those without a finite loss since the last that had one; the most of these so far.
        self._skips = torch.zeros(3, dtype=torch.int64, device=device)

    @property
    def loss_scale(self) -> float | Tensor:
        """Factor on the loss before the backward pass, which keeps float16 gradients from underflowing."""
        return self._scaler.scale(torch.ones_like(self.gradient_norm)) if self._scaler.is_enabled() else 1.0

    @property
    def model_to_save(self) -> nn.Module:
        """The model to evaluate and save: the moving average if there is one, else the trained model."""
        return self._model if self._average is None else self._average

    @property
    def skipped(self) -> int:
        """Number of skipped steps; waits for the device."""
        return int(self._skips[0])

    @property
    def is_sound(self) -> bool:
        """Whether the last step had a finite loss, and has left finite weights; waits for the device."""
        return int(self._skips[1]) == 0 and self.is_finite

    @property
    def is_finite(self) -> bool:
        """Whether the weights, and batch norms' statistics, are finite; a mask holds −inf. Waits for the device."""
        buffers = (buffer for buffer in self._model.buffers() if buffer.is_floating_point())
        return all(bool(values.isfinite().all()) for values in self._parameters) and not any(
            bool(values.isnan().any() or values.isposinf().any()) for values in buffers
        )

    @torch.no_grad()
    def apply(self, step: int, loss: Tensor) -> None:
        """Update the weights with the current gradients, and clear the gradients. Skipped if they are not finite."""
        self.learning_rate = learning_rate_at(step, self._steps, self._recipe)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        scaled = self.loss_scale != 1.0
        self._scaler.unscale_(self._optimizer)  # before clipping, whose limit applies to the true gradients
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self.gradient_norm = nn.utils.get_total_norm(gradients)
        if self._recipe.clip_gradient_norm:
            nn.utils.clip_grads_with_norm_(self._parameters, self._recipe.clip_gradient_norm, self.gradient_norm)
        skip = ~(loss.isfinite() & self.gradient_norm.isfinite())
        untyped: Any = self._optimizer
        untyped.found_inf = skip.float()  # by which the fused kernel leaves weights and moments as they are
        if skip.device.type != "mps" or not skip:  # Apple's kernel does not look at it
            self._optimizer.step()
        clamp_scales(self._model, self._objective)
        self._update_average()
        if self._scaler.is_enabled():
            self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        # Else, the scaler is still searching for its scale.
        counts = skip & ~(loss.isfinite() & scaled & (self.loss_scale > 1.0))
        in_a_row = (self._skips[1] + counts) * skip
        self._skips = torch.stack([self._skips[0] + skip, in_a_row, torch.maximum(self._skips[2], in_a_row)])

    def _update_average(self) -> None:
        """Add the weights to the moving average; after a skipped step, those of the step before count once more."""
        if self._average is None:
            return
        decay = average_decay_at(self._averaged, self._recipe.ema_decay) if self._averaged else 0.0
        torch._foreach_lerp_(list(self._average.parameters()), list(self._model.parameters()), 1 - decay)
        # Buffers are copied, not averaged: a causal mask holds −inf, whose average with itself is NaN.
        for buffer, own in zip(self._average.buffers(), self._model.buffers(), strict=True):
            buffer.copy_(own)
        self._averaged += 1

    def require_progress(self, done: int, *, run: Path) -> None:
        """Raise DivergedRunError if the loss was not finite for several steps in a row; waits for the device."""
        skipped, _, in_a_row = self._skips.tolist()
        nothing_learnt = skipped == done == self._steps
        if nothing_learnt or in_a_row >= MAX_CONSECUTIVE_SKIPS:
            count = skipped if nothing_learnt else in_a_row
            raise diverged_error(run, f"the loss was not finite for {count} steps in a row, up to step {done}")

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimiser, loss scale, moving average and skipped steps, without model and objective."""
        average = self._average.state_dict() if self._average is not None else None
        return {
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": average,
            "averaged": self._averaged,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._averaged = state["averaged"]
        self._skips[0] = state["skipped"]


def diverged_error(run: Path, reason: str) -> DivergedRunError:
    """Return the error for a run that cannot go on, with its last good checkpoint: others are not written."""
    checkpoints = list_checkpoints(run)
    last = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint was written yet"
    return DivergedRunError(
        f"The run has diverged: {reason}; {last}.",
        hint="begin a new run, with another {output}, with a lower learning rate, or {precision} fp32",
    )


@contextmanager
def named_divergence(run: Path) -> Iterator[None]:
    """Within the block, a student whose embeddings are not finite is the sign of a run that has diverged."""
    try:
        yield
    except NotFiniteError as error:
        raise diverged_error(run, "the student's embeddings are not finite numbers") from error
