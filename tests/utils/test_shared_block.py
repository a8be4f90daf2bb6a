"""A block around what all threads share is entered by the first thread and left by the last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support import share_in_threads

from clip_rd_edge.utils.process import SharedBlock


def test_the_first_thread_enters_and_the_last_one_leaves() -> None:
    events: list[str] = []

    @contextmanager
    def block() -> Iterator[None]:
        events.append("entered")
        yield
        events.append("left")

    shared = SharedBlock(block)
    for _ in range(2):
        assert share_in_threads(lambda: shared, lambda: [*events]) == ["entered"]
        assert events == ["entered", "left"]
        events.clear()


def test_a_block_that_cannot_be_entered_can_be_tried_again() -> None:
    attempts: list[int] = []

    @contextmanager
    def block() -> Iterator[None]:
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("not yet")
        yield

    shared = SharedBlock(block)
    with pytest.raises(OSError, match="not yet"), shared:
        pass
    with shared, shared:
        assert len(attempts) == 2
