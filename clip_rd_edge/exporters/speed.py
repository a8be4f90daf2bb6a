"""Which layers INT8 makes no slower. Never imports torch.

Neighbouring layers are quantised a group at a time and timed beside none of them: values are converted at a group's
borders, and what follows a convolution, such as SiLU, may be slower in INT8, so that a group can cost more than it
saves. MobileViT's first layers do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from clip_rd_edge.exporters.measure import Inputs, Timer, latencies, lowest_tenth
from clip_rd_edge.utils.timing import time_in_turn

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
