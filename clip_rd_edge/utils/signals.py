"""The signals that ask a process to stop, who handles them, and the terminal that one of them takes away."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return SIGINT, SIGTERM, and SIGHUP, which a lost terminal sends, unless it is ignored, as under nohup.

    Windows has SIGBREAK, which supervisors send there: no process gets SIGTERM from another.
    """
    others = [getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    heard = [number for number in others if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return signal.SIGINT, signal.SIGTERM, *heard


@contextmanager
def handled_by(handle: Callable[[int, FrameType | None], None], numbers: Iterable[int]) -> Iterator[None]:
    """Within the block, a function handles these signals, unless this is not the main thread: it alone receives any.

    A handler that is not Python's stays: a program that embeds Python may have one, and Python cannot restore it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    restorable = [number for number in numbers if signal.getsignal(number) is not None]
    previous = {number: signal.signal(number, handle) for number in restorable}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave_lost_terminal() -> None:
    """Let what is printed from now on go nowhere if its terminal is lost, where writing is an error."""
    for output in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(output).st_mode) and not os.isatty(output):
                discard_output(output)


def discard_output(descriptor: int) -> None:
    """Let what is written to a descriptor from now on, also what waits in a buffer, go nowhere."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)
