"""Context managers that change what all threads share, such as the log, used by several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack


class SharedBlock:
    """A block that threads may be in at once: the first one enters a context manager, and the last one leaves it.

    Otherwise the second thread would save what the first has set, and restore that for good. What is raised in the
    block propagates, and the context manager is not told.

    Args:
        make: returns the context manager, which saves what it changes when it is entered and restores it when it is
            left, in whatever thread that is.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make = make
        self._lock, self._inside, self._stack = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._stack.enter_context(self._make())
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._stack.close()
