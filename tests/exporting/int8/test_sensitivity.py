from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from clip_rd_edge.exporting.int8.candidates import layers_no_slower
from clip_rd_edge.utils.timing import Milliseconds

SAVED_MS = {"a": -1.0, "b": -0.5, "c": 2.0, "d": 0.0, "e": -0.05}  # saved by each layer in INT8, of 10 ms


class Session:
    """A tower with these layers in INT8; running it returns their names."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = layers

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="x")]

    def run(self, names: None, feed: Mapping[str, Any]) -> Sequence[str]:
        return self.layers


def timer(calls: Mapping[str, Callable[[], Any]]) -> Mapping[str, Milliseconds]:
    return {name: np.full(5, 10 - sum(SAVED_MS[layer[0]] for layer in call())) for name, call in calls.items()}


def test_layers_that_int8_makes_slower_are_excluded() -> None:
    inputs = np.zeros((1, 3), dtype=np.float32)
    assert layers_no_slower(["a", "b", "c", "d", "e"], Session, inputs, timer=timer) == ("c", "d", "e")
    assert layers_no_slower(["a", "b"], Session, inputs, timer=timer) == ()


def test_neighbours_are_timed_together() -> None:
    layers = [f"{kind}{i}" for kind in "acbd" for i in range(4)]  # 16 layers, two per group
    inputs = np.zeros((1, 3), dtype=np.float32)
    assert layers_no_slower(layers, Session, inputs, timer=timer) == (
        *(f"c{i}" for i in range(4)),
        *(f"d{i}" for i in range(4)),
    )
    assert layers_no_slower(["c0", "a0", "c1", *layers[1:]], Session, inputs, timer=timer)[:2] == ("c0", "a0")
