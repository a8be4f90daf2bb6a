"""What the inference engines share: the limits of threads, and models in place of ONNX Runtime's sessions."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clip_rd_edge.errors import UsageError

MAX_THREADS = 1_024  # each takes memory, and hundreds of thousands take minutes to start


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
    """Raise UsageError if a number of threads is neither None nor a whole number from 1 to MAX_THREADS."""
    if threads is not None and not (isinstance(threads, int | np.integer) and 1 <= threads <= MAX_THREADS):
        raise UsageError(
            f"The number of threads is {threads!r}; expected 1 to {MAX_THREADS:,}.",
            hint=f"this machine has {os.cpu_count()} cores",
        )
