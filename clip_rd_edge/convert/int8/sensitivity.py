"""Which layers INT8 hurts most. Never imports torch.

Each layer, or group of neighbours, is quantised alone, and its error is what the embeddings then lose: 1 − centred
cosine. The errors of layers nearly add up, so that leaving out the worst until the rest is small enough gives a tower
that holds an agreement.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.convert.parity import Inputs, Timer, agreement, latencies, lowest_tenth
from clip_rd_edge.utils.timing import time_in_turn


@dataclass(frozen=True)
class GroupError:
    """Neighbouring layers, and what quantising them alone costs."""

    layers: tuple[str, ...]
    error: float


def group_errors(
    layers: Sequence[str],
    embed_with: Callable[[Sequence[str]], Embeddings],
    reference: Embeddings,
    *,
    max_seconds: float,
) -> list[GroupError]:
    """The error of each layer; of groups of neighbours where single layers would take longer than `max_seconds`.

    Args:
        embed_with: embeddings (N, D) of the tower with only the given layers in INT8.
        reference: the same in float32.
    """
    started = time.perf_counter()
    first = _error(layers[:1], embed_with, reference)
    size = max(1, math.ceil(len(layers) * (time.perf_counter() - started) / max_seconds))
    if size == 1:
        return [first, *(_error(layers[i : i + 1], embed_with, reference) for i in range(1, len(layers)))]
    groups = (layers[start : start + size] for start in range(0, len(layers), size))
    return [_error(group, embed_with, reference) for group in groups]


def _error(
    layers: Sequence[str], embed_with: Callable[[Sequence[str]], Embeddings], reference: Embeddings
) -> GroupError:
    try:
        embeddings = embed_with(layers)
    except Exception:  # noqa: BLE001 — the quantiser raises all kinds; layers that it cannot do are left in float
        return GroupError(tuple(layers), math.inf)
    return GroupError(tuple(layers), 1 - agreement(reference, embeddings).centred_cosine)


def layers_within(errors: Sequence[GroupError], allowed: float) -> tuple[str, ...]:
    """The layers to quantise, in their order: all but the worst groups, left out until the errors sum to `allowed`."""
    kept = sorted(range(len(errors)), key=lambda i: errors[i].error)
    while kept and sum(errors[i].error for i in kept) > allowed:
        kept.pop()
    return tuple(layer for i in sorted(kept) for layer in errors[i].layers)


_GROUPS = 8
_NO_SLOWER = 1.01  # than without the group: as fast is enough, for its weights take a quarter of the room
_NONE = "none"
_TIMER = partial(time_in_turn, rounds=30, max_seconds=8.0)


def layers_no_slower(
    layers: Sequence[str],
    open_with: Callable[[Sequence[str]], Any],
    one: Inputs,
    *,
    timer: Timer = _TIMER,
) -> tuple[str, ...]:
    """The layers of those groups that cost no time, in their order.

    Args:
        layers: in the order of computation, at least one.
        open_with: a session of the tower with the given layers in INT8.
        one: inputs, the first of which is timed.
        timer: times calls in turn.
    """
    size = math.ceil(len(layers) / _GROUPS)
    groups = {str(start): tuple(layers[start : start + size]) for start in range(0, len(layers), size)}
    sessions = {_NONE: open_with(())} | {name: open_with(group) for name, group in groups.items()}
    times = latencies(sessions, one, timer=timer)
    fastest = {name: lowest_tenth(times[name]) for name in sessions}
    return tuple(
        layer for name, group in groups.items() if fastest[name] <= _NO_SLOWER * fastest[_NONE] for layer in group
    )
