"""Float32 or bfloat16: whichever is faster here, by a measurement and not by the processor's name."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Literal

import torch

from clip_rd_edge.distill.config import Precision
from clip_rd_edge.distill.loader import Batch
from clip_rd_edge.distill.step import TrainingStep

AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}


def choose_precision(
    asked: Precision, step_in: Callable[[torch.dtype | None], TrainingStep], batch: Batch, *, rounds: int = 3
) -> tuple[Literal["fp32", "bf16"], str]:
    """The precision to train in, and a sentence that says why.

    Args:
        step_in: makes a step over the very student and objective in a precision; their weights and buffers are as
            before afterwards, and they have no gradients.
    """
    if asked != "auto":
        return asked, f"{asked}, as asked"
    if torch.cuda.is_available():
        return "bf16", "bf16, on a CUDA device"
    steps = {name: step_in(dtype) for name, dtype in AUTOCAST.items()}
    model, objective = steps["fp32"].student.model, steps["fp32"].objective
    before = copy.deepcopy(model.state_dict())  # batch norms count what they see
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step(batch, 0)
            if turn:  # the first is warm-up
                seconds[name].append(time.perf_counter() - started)
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)
    objective.zero_grad(set_to_none=True)
    fp32, bf16 = (min(seconds[name]) for name in ("fp32", "bf16"))
    # bfloat16 costs accuracy in the last digits: it has to pay for that.
    chosen: Literal["fp32", "bf16"] = "bf16" if bf16 < 0.95 * fp32 else "fp32"
    return chosen, f"{chosen}, measured: a step takes {fp32 * 1e3:.0f} ms in fp32 and {bf16 * 1e3:.0f} ms in bf16"
