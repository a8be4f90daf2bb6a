"""AdamW with the recipe's parameter groups and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Return the update of an exponential moving average, for `AveragedModel`."""

    def update(averaged: Any, current: Any, count: Tensor | int) -> None:
        get_ema_multi_avg_fn(average_decay_at(int(count), decay))(averaged, current, count)  # type: ignore[no-untyped-call]

    return update


# Several consecutive steps without finite gradients mean that the run has diverged.
MAX_CONSECUTIVE_SKIPS = 5


class RunOptimizer:
    """Optimiser, loss scale and moving average of a run.

    Attributes:
        loss_scale: factor on the loss before the backward pass, which keeps float16 gradients from underflowing; 1 in
            other precisions.
        learning_rate: of the last step.
        gradient_norm: of the last step, before clipping.
        skipped: number of skipped steps.
    """

    def __init__(self, model: nn.Module, objective: Objective, recipe: Recipe, *, steps: int) -> None:
        self._model, self._objective, self._recipe, self._steps = model, objective, recipe, steps
        self._optimizer = build_optimizer(model, objective, recipe)
        self._parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        device = next(model.parameters()).device
        self._scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self._average: AveragedModel | None = None
        if recipe.ema_decay:
            # Buffers are copied, not averaged: a causal mask holds −inf, whose average with itself is NaN.
            self._average = AveragedModel(model, multi_avg_fn=moving_average(recipe.ema_decay))
        self.learning_rate = self.gradient_norm = 0.0
        self.skipped = self._consecutive_skips = 0

    @property
    def loss_scale(self) -> float:
        """See the class."""
        one = torch.ones((), device=self._parameters[0].device)
        return float(self._scaler.scale(one)) if self._scaler.is_enabled() else 1.0

    @property
    def model_to_save(self) -> nn.Module:
        """The model to evaluate and save: the moving average if there is one, else the trained model."""
        return self._average.module if self._average is not None else self._model

    @property
    def is_sound(self) -> bool:
        """Whether the last step had a finite loss, and has left finite weights."""
        return self._consecutive_skips == 0 and self.is_finite

    @property
    def is_finite(self) -> bool:
        """Whether the weights, and the statistics of batch norms, are finite; a mask holds −inf."""
        buffers = (buffer for buffer in self._model.buffers() if buffer.is_floating_point())
        return all(bool(values.isfinite().all()) for values in self._parameters) and not any(
            bool(values.isnan().any() or values.isposinf().any()) for values in buffers
        )

    def apply(self, step: int, loss: float, *, run: Path) -> None:
        """Update the weights with the current gradients, and clear the gradients. Skipped if they are not finite.

        Args:
            step: counted from 0.
            loss: of this step.
            run: folder of the run, whose last checkpoint an error names.
        """
        self.learning_rate = learning_rate_at(step, self._steps, self._recipe)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        scaled = self.loss_scale != 1.0
        self._scaler.unscale_(self._optimizer)  # before clipping, whose limit applies to the true gradients
        max_norm = self._recipe.clip_gradient_norm or math.inf
        self.gradient_norm = float(nn.utils.clip_grad_norm_(self._parameters, max_norm))
        finite = math.isfinite(loss) and math.isfinite(self.gradient_norm)
        if finite:
            self._scaler.step(self._optimizer)
            clamp_scales(self._model, self._objective)
            if self._average is not None:
                self._average.update_parameters(self._model)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._count_skips(step, finite, overflow=scaled and math.isfinite(loss), run=run)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimiser, loss scale, moving average and skipped steps, without model and objective."""
        average = self._average.state_dict() if self._average is not None else None
        return {
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": average,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self.skipped = state["skipped"]

    def _count_skips(self, step: int, finite: bool, *, overflow: bool, run: Path) -> None:
        if finite:
            self._consecutive_skips = 0
            return
        self.skipped += 1
        if not (overflow and self.loss_scale > 1.0):  # else the scaler is still searching for its scale
            self._consecutive_skips += 1
        nothing_learnt = self.skipped == step + 1 == self._steps
        if nothing_learnt or self._consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
            count = self.skipped if nothing_learnt else self._consecutive_skips
            raise diverged_error(run, f"the loss was not finite for {count} steps in a row, up to step {step + 1}")


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
