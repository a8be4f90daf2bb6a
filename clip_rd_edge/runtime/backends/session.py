"""What the engines beside ONNX Runtime share, whose models take the place of its sessions."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clip_rd_edge.errors import UsageError


class NamedInput(NamedTuple):
    """An input of a model, as a session describes it."""

    name: str


class OneInputModel(ABC):
    """A model with the two methods of an ONNX Runtime session that are used here; its file takes one input at a time.

    Calls run one at a time, too: an engine owns its buffers, or does not say that several threads may call it.

    Args:
        inputs: names of the inputs.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._inputs = [NamedInput(name) for name in inputs]

    def get_inputs(self) -> list[NamedInput]:
        """Return the inputs with their names."""
        return self._inputs

    def run(self, names: Sequence[str] | None, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Run the model on each row of its input, (N, …); return its output, (N, D)."""
        (rows,) = feed.values()
        with self._lock:
            return [np.concatenate([self.run_row(row) for row in rows])]

    @abstractmethod
    def run_row(self, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the output of one row, (1, D)."""


def require_threads(threads: int | None) -> None:
    """Raise UsageError if a number of threads is less than 1; None leaves it to the engine."""
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; expected at least 1.")
