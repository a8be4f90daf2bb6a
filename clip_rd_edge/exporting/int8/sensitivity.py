"""Find the layers that lose most in INT8.

Each layer, or group of neighbouring layers, is quantised alone; its error is 1 − the centred cosine of the embeddings
with float32's. That ranks the layers. Their errors need not add up: two layers may disturb each other, or make up for
each other. So the worst layers are left in float one after the other, until the error of all others together is small
enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.exporting.parity import Inputs, Timer, agreement, latencies, p10
from clip_rd_edge.utils.timing import time_in_turn

# Returns the embeddings (N, D) of a tower with only the given layers in INT8, or None if they cannot be quantised.
EmbedWith = Callable[[Sequence[str]], Embeddings | None]

SENSITIVITY_SAMPLES = 16  # calibration samples that the errors are measured on
_MAX_SECONDS = 15.0
# Shares of the max error that the INT8 layers may have on the calibration samples; a smaller share may be as fast.
_ERROR_SHARES = (0.9, 0.4, 0.1)


def robust_layers(
    layers: Sequence[str],
    embed_with: EmbedWith,
    reference: Embeddings,
    *,
    max_error: float,
) -> list[tuple[str, ...]]:
    """Return the layers to quantise for shares of the max error, in their order; the first are the most.

    Shares with the same layers, or with none, have one entry.

    Args:
        layers: names, in the order of computation.
        embed_with: see `EmbedWith`.
        reference: the embeddings (N, D) in float32.
        max_error: 1 − the min centred cosine.
    """
    errors = group_errors(layers, embed_with, reference, max_seconds=_MAX_SECONDS)
    limits = [share * max_error for share in _ERROR_SHARES]
    return with_fewest_in_float(errors, embed_with, reference, limits, max_seconds=_MAX_SECONDS)


@dataclass(frozen=True)
class GroupError:
    """Neighbouring layers, and the error when they alone are quantised."""

    layers: tuple[str, ...]
    error: float


def group_errors(
    layers: Sequence[str],
    embed_with: EmbedWith,
    reference: Embeddings,
    *,
    max_seconds: float,
) -> list[GroupError]:
    """Measure the error of each layer, or of groups of neighbours if single layers would exceed `max_seconds`.

    Args:
        layers, embed_with, reference: as for `robust_layers`.
        max_seconds: approximate limit of the processor time of all measurements.
    """
    started = time.process_time()  # so that a busy machine does not make larger groups, and a larger file
    first = group_error(layers[:1], embed_with, reference)
    size = max(1, math.ceil(len(layers) * (time.process_time() - started) / max_seconds))
    if size == 1:
        return [first, *(group_error(layers[i : i + 1], embed_with, reference) for i in range(1, len(layers)))]
    groups = (layers[start : start + size] for start in range(0, len(layers), size))
    return [group_error(group, embed_with, reference) for group in groups]


def group_error(layers: Sequence[str], embed_with: EmbedWith, reference: Embeddings) -> GroupError:
    """Measure the error of some layers together, infinite if they cannot be quantised; for arguments, see above."""
    embeddings = embed_with(layers)
    error = math.inf if embeddings is None else 1 - agreement(reference, embeddings).centred_cosine
    return GroupError(tuple(layers), error)


def layers_within(errors: Sequence[GroupError], max_error: float) -> tuple[str, ...]:
    """Return the layers to quantise, in their order: the best groups whose errors sum to at most `max_error`."""
    kept = sorted(range(len(errors)), key=lambda i: errors[i].error)
    while kept and sum(errors[i].error for i in kept) > max_error:
        kept.pop()
    return tuple(layer for i in sorted(kept) for layer in errors[i].layers)


def with_fewest_in_float(
    errors: Sequence[GroupError],
    embed_with: EmbedWith,
    reference: Embeddings,
    limits: Sequence[float],
    *,
    max_seconds: float,
) -> list[tuple[str, ...]]:
    """Return the layers to quantise for the limits of their common error, in their order: all but the fewest worst.

    Limits with the same layers, or with none, share one entry.

    Args:
        errors: of `group_errors`, whose `embed_with` and `reference` the others are.
        max_seconds: approximate limit of the processor time; `layers_within` decides what was not found by then.
    """
    ranked = sorted(range(len(errors)), key=lambda i: errors[i].error)
    found: dict[float, tuple[str, ...]] = {}
    started = time.process_time()
    for count in range(len(ranked), 0, -1):
        layers = tuple(layer for i in sorted(ranked[:count]) for layer in errors[i].layers)
        error = group_error(layers, embed_with, reference).error
        found = {limit: layers for limit in limits if error <= limit} | found
        if len(found) == len(set(limits)) or time.process_time() - started > max_seconds:
            break
    return list(dict.fromkeys(found.get(limit) or layers_within(errors, limit) for limit in limits))


_GROUPS = 8
_NO_SLOWER = 1.01  # relative to float32: equal speed is enough, because INT8 weights take a quarter of the space
_NONE = "none"
_TIMER = partial(time_in_turn, rounds=30, max_seconds=8.0)


def layers_no_slower(
    layers: Sequence[str],
    open_with: Callable[[Sequence[str]], Any],
    inputs: Inputs,
    *,
    timer: Timer = _TIMER,
) -> tuple[str, ...]:
    """Return the layers of the groups that INT8 makes no slower, in their order.

    Args:
        layers: names, in the order of computation, at least one.
        open_with: opens a session of the tower with the given layers in INT8.
        inputs: model inputs; the first is timed.
        timer: times calls in turn.
    """
    size = math.ceil(len(layers) / _GROUPS)
    groups = {str(start): tuple(layers[start : start + size]) for start in range(0, len(layers), size)}
    sessions = {_NONE: open_with(())} | {name: open_with(group) for name, group in groups.items()}
    latency_ms = {name: p10(times) for name, times in latencies(sessions, inputs, timer=timer).items()}
    return tuple(
        layer for name, group in groups.items() if latency_ms[name] <= _NO_SLOWER * latency_ms[_NONE] for layer in group
    )
