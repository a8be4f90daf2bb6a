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

from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.exporters.parity import agreement


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
    progress: Callable[[int, int], None],
) -> list[GroupError]:
    """The error of each layer; of groups of neighbours where single layers would take longer than `max_seconds`.

    Args:
        embed_with: embeddings (N, D) of the tower with only the given layers in INT8.
        reference: the same in float32.
        progress: told how many groups are done, and of how many.
    """
    started = time.perf_counter()
    embed_with(layers[:1])
    one = time.perf_counter() - started
    size = max(1, math.ceil(len(layers) * one / max_seconds))
    groups = [tuple(layers[start : start + size]) for start in range(0, len(layers), size)]
    errors = []
    for i, group in enumerate(groups):
        progress(i, len(groups))
        errors.append(GroupError(group, 1 - agreement(reference, embed_with(group)).centred_cosine))
    return errors


def layers_within(errors: Sequence[GroupError], allowed: float) -> tuple[str, ...]:
    """The layers to quantise, in their order: all but the worst groups, left out until the errors sum to `allowed`."""
    kept = sorted(range(len(errors)), key=lambda i: errors[i].error)
    while kept and sum(errors[i].error for i in kept) > allowed:
        kept.pop()
    return tuple(layer for i in sorted(kept) for layer in errors[i].layers)
