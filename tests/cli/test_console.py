"""What the commands print: progress, tables and durations, on a terminal and in a pipe."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console
from support import Terminal, wait_until

from clip_rd_edge.cli import console as _console
from clip_rd_edge.cli.console import SafeConsole, console_reporter


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """A terminal of 80 columns in place of stderr."""
    stream = Terminal()
    console = Console(file=stream, force_terminal=True, width=80, highlight=False, color_system=None)
    monkeypatch.setattr(_console, "stderr", console)
    yield stream


def test_a_command_shows_something_at_once_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as stream:
        with console_reporter() as reporter:
            assert wait_until(lambda: "starting" in stream.getvalue())
            reporter.update("training", 5, 20, "loss 1.0")
            assert wait_until(lambda: "5/20" in stream.getvalue())
        shown = stream.getvalue()
        assert "elapsed" in shown
        assert "/?" not in shown
        assert shown.rstrip().endswith("\x1b[2K")  # the line is cleared


@pytest.mark.parametrize(
    ("stream", "variables"),
    [
        (io.StringIO, {}),
        (io.StringIO, {"FORCE_COLOR": "1", "TERM": "xterm"}),
        (Terminal, {"TERM": "dumb"}),
    ],
)
def test_without_a_terminal_that_redraws_there_is_a_line_at_once_and_then_one_a_minute(
    monkeypatch: pytest.MonkeyPatch, stream: Callable[[], io.StringIO], variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    file, now = stream(), [1000.0]
    monkeypatch.setattr(_console, "stderr", SafeConsole(file=file, width=80))
    monkeypatch.setattr("clip_rd_edge.cli.console.time.monotonic", lambda: now[0])
    with console_reporter() as reporter:
        assert _plain(file) == "· starting\n"
        for step in range(1, 130):
            now[0] += 1
            reporter.update("training", step, 1200, "loss 1.0")
    assert _plain(file).splitlines()[1:] == ["· training 60/1,200, loss 1.0", "· training 120/1,200, loss 1.0"]


def _plain(stream: io.StringIO) -> str:
    """Return what was written without its colours; whatever else a terminal would obey stays."""
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
