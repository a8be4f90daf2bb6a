"""Options of what INT8 may cost, and what becomes of a tower that it costs more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from clip_rd_edge.errors import UsageError

if TYPE_CHECKING:
    from clip_rd_edge.convert.int8.select import Budget

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--min-agreement", type=click.FloatRange(0, 1),
        help="Least centred cosine of INT8's embeddings with float32's.  [default: 0.99; of the text tower 0.995]",
    ),
    click.option(
        "--max-loss", type=click.FloatRange(0, 100), metavar="POINTS",
        help="Zero-shot accuracy that INT8 may lose on held-out pairs.  [default: 0.5]",
    ),
    click.option(
        "--fallback", type=click.Choice(["fp32", "fp16", "none"]),
        help="What a tower becomes that INT8 makes no better. Default: fp32 for one tower; where neither is better in "
        "INT8, nothing is written.",
    ),
)  # fmt: skip


def int8_options(command: F) -> F:
    """Give a command --min-agreement, --max-loss and --fallback."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def budget_of(
    *, precision: str, format: str, min_agreement: float | None, max_loss: float | None, fallback: str | None
) -> Budget:
    """What the options say.

    Raises:
        UsageError: an option was given that the format or the precision has no use for.
    """
    given = {"--min-agreement": min_agreement, "--max-loss": max_loss, "--fallback": fallback}
    names = [name for name, value in given.items() if value is not None]
    if precision != "int8" and names:
        raise UsageError(f"{names[0]} is for --precision int8, not {precision}.")
    if format == "trt" and (fallback or max_loss is not None):
        name = "--fallback" if fallback else "--max-loss"
        raise UsageError(f"{name} is for ONNX Runtime and OpenVINO; TensorRT's INT8 falls back to FP16 by layer.")

    from clip_rd_edge.convert.int8.select import Budget

    budget = Budget()
    return Budget(
        image=budget.image if min_agreement is None else min_agreement,
        text=budget.text if min_agreement is None else min_agreement,
        max_loss=budget.max_loss if max_loss is None else max_loss,
    )
