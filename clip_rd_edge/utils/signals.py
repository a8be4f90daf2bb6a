"""The signals that ask a process to stop, and the terminal that one of them takes away."""

from __future__ import annotations

import os
import signal
import stat
from contextlib import suppress


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return SIGINT, SIGTERM, and SIGHUP, which a lost terminal sends, unless it is ignored, as under nohup."""
    hang_up: signal.Signals | None = getattr(signal, "SIGHUP", None)  # Windows has none
    if hang_up is None or signal.getsignal(hang_up) in (signal.SIG_IGN, None):
        return signal.SIGINT, signal.SIGTERM
    return signal.SIGINT, signal.SIGTERM, hang_up


def leave_lost_terminal() -> None:
    """Let what is printed from now on go nowhere if its terminal is lost, where writing is an error."""
    for output in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(output).st_mode) and not os.isatty(output):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, output)
                os.close(nothing)
