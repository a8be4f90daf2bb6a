"""Float32 or bfloat16: whichever is faster here, by a measurement and not by the processor's name."""

from __future__ import annotations

import copy
import time

import torch

from clip_rd_edge.distill.config import Precision
from clip_rd_edge.distill.loader import Batch
from clip_rd_edge.distill.step import TrainingStep

AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}


def choose_precision(asked: Precision, step: TrainingStep, batch: Batch, *, rounds: int = 3) -> tuple[str, str]:
    """The precision to train in, and a sentence that says why.

    Args:
        step: a step over the very student and objective; its weights, buffers and gradients are as before afterwards.
    """
    if asked != "auto":
        return asked, f"{asked}, as asked"
    if torch.cuda.is_available():
        return "bf16", "bf16, on a CUDA device"
    model = step.student.model
    before = copy.deepcopy(model.state_dict())  # batch norms count what they see
    seconds: dict[str, list[float]] = {name: [] for name in AUTOCAST}
    rng = torch.get_rng_state()
    for turn in range(rounds + 1):
        for name, dtype in AUTOCAST.items():
            started = time.perf_counter()
            step.with_autocast(dtype)(batch).loss.backward()
            if turn:  # the first is warm-up
                seconds[name].append(time.perf_counter() - started)
    torch.set_rng_state(rng)
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)
    step.objective.zero_grad(set_to_none=True)
    fp32, bf16 = (min(seconds[name]) for name in ("fp32", "bf16"))
    # bfloat16 costs accuracy in the last digits: it has to pay for that.
    chosen = "bf16" if bf16 < 0.95 * fp32 else "fp32"
    return chosen, f"{chosen}, measured: a step takes {fp32 * 1e3:.0f} ms in fp32 and {bf16 * 1e3:.0f} ms in bf16"
