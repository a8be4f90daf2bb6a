"""Who handles the signals that ask a process to stop."""

from __future__ import annotations

import signal
from types import FrameType

import pytest

from clip_rd_edge.utils.process import handled_by


def _handle(number: int, frame: FrameType | None) -> None:
    """Do nothing."""


def test_a_handler_of_a_program_that_embeds_python_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python calls a handler None that it has not installed, and cannot restore it."""
    handler_of = signal.getsignal
    before = [handler_of(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else handler_of(number))
    with handled_by(_handle, (signal.SIGINT, signal.SIGTERM)):
        assert [handler_of(number) for number in (signal.SIGINT, signal.SIGTERM)] == [_handle, before[1]]
    assert [handler_of(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
