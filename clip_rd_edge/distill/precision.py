"""Float32 or bfloat16: whichever is faster here, by a measurement and not by the processor's name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import torch

from clip_rd_edge.distill.config import Precision
from clip_rd_edge.distill.loader import Batch
from clip_rd_edge.distill.step import TrainingStep
from clip_rd_edge.distill.teacher import Teacher
from clip_rd_edge.utils.timing import time_in_turn

AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Measured = Literal["fp32", "bf16"]


def choose_teacher_precision(
    asked: Precision, teacher_in: Callable[[torch.dtype | None], Teacher], batch: Batch, *, rounds: int = 3
) -> tuple[Precision, str]:
    """The precision for the teacher's pictures, and a sentence that says why."""
    if asked != "auto":
        return asked, f"{asked}, as asked"
    if torch.cuda.is_available():
        return "bf16", "bf16, on a CUDA device"
    pixels = batch.teacher_pixels
    if pixels is None:
        raise ValueError("The batch was loaded without pictures for the teacher.")
    teachers = {name: teacher_in(AUTOCAST[name]) for name in get_args(Measured)}
    calls = {name: partial(teacher.embed_images, pixels) for name, teacher in teachers.items()}
    return _faster(calls, "its part of a step", rounds)


def choose_precision(
    asked: Precision, step_in: Callable[[torch.dtype | None], TrainingStep], batch: Batch, *, rounds: int = 3
) -> tuple[Precision, str]:
    """The precision to train in, and a sentence that says why.

    Args:
        step_in: makes a step over the very student and objective in a precision; their weights and buffers are as
            before afterwards, and they have no gradients.
    """
    if asked != "auto":
        return asked, f"{asked}, as asked"
    if torch.cuda.is_available():
        return "bf16", "bf16, on a CUDA device"
    steps = {name: step_in(AUTOCAST[name]) for name in get_args(Measured)}
    model, objective = steps["fp32"].student.model, steps["fp32"].objective
    before = copy.deepcopy(model.state_dict())  # batch norms count what they see
    answer = _faster({name: partial(step, batch, 0) for name, step in steps.items()}, "a step", rounds)
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)
    objective.zero_grad(set_to_none=True)
    return answer


def _faster(calls: Mapping[str, Callable[[], object]], what: str, rounds: int) -> tuple[Precision, str]:
    times = time_in_turn(calls, rounds=rounds, warmup=1)
    fp32, bf16 = (float(times[name].min()) for name in ("fp32", "bf16"))
    # bfloat16 costs accuracy in the last digits: it has to pay for that.
    chosen: Precision = "bf16" if bf16 < 0.95 * fp32 else "fp32"
    return chosen, f"{chosen}, measured: {what} takes {fp32:.0f} ms in fp32 and {bf16:.0f} ms in bf16"
