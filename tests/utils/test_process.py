"""Who handles the signals that ask a process to stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support import share_in_threads

from clip_rd_edge.utils.process import SharedBlock, quiet_logs


def _in_another_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_a_library_is_quiet_in_its_thread_alone_and_up_to_the_level(caplog: pytest.LogCaptureFixture) -> None:
    host, library = logging.getLogger("test.host"), logging.getLogger("test.library")
    with quiet_logs(logging.WARNING):
        library.warning("dropped")
        logging.warning("dropped")
        library.error("failed")
        _in_another_thread(lambda: host.warning("heard"))
    library.warning("heard again")
    assert [record.message for record in caplog.records] == ["failed", "heard", "heard again"]


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
