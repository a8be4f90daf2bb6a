"""How a run stops on SIGINT, SIGTERM and SIGHUP: between two steps with its state saved, and elsewhere at once.

Job schedulers and service managers send SIGTERM to every process of a job, so the loader's workers get it, too. They
ignore it: the run still needs them, and stops them itself when it ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from clip_rd_edge.utils.process import handled_by, leave_lost_terminal, stop_signals


class Stopped(BaseException):
    """A signal requested a stop while the run was waiting or evaluating, or outside of its steps."""


class StopRequest:
    """Whether a signal requested a stop: true once `signal_name` is set."""

    def __init__(self) -> None:
        self.signal_name = ""
        self._at_once = True

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block, a signal only sets the request: the code there must look at it."""
        with self._raising(False):
            yield

    def obey_no_more(self) -> None:
        """From now on, a signal only sets the request: the code ends for another reason, which it has yet to tell."""
        self._at_once = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block, a signal raises `Stopped`, also one that arrived before."""
        if self:
            raise Stopped
        with self._raising(True):
            yield

    @contextmanager
    def _raising(self, at_once: bool) -> Iterator[None]:
        previous, self._at_once = self._at_once, at_once
        try:
            yield
        finally:
            # Once raised, never again: what follows is saving the state.
            self._at_once = previous and not self

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        leave_lost_terminal()
        first, self.signal_name = not self, signal.Signals(number).name
        if first and self._at_once:
            self._at_once = False
            raise Stopped


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block, the first of the `stop_signals` sets the request; a second SIGINT interrupts at once."""
    request = StopRequest()
    with handled_by(request._handle, stop_signals()):
        yield request


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Within the block, this thread receives none of the `stop_signals`; processes started in it never do."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def obey_only_the_parent(parent: int) -> None:
    """End this process on SIGTERM from `parent` and ignore others'; for processes started with the signals blocked.

    What `os.getppid` says is not enough: from Python 3.14 on, a fork server stands between the two.

    The parent terminates a worker that does not end by itself, such as one that waits for a file system. One that stops
    while it takes a batch closes the connection to a thread of the worker, which says nothing about it.
    """
    sys.excepthook = _print_unless_connection_is_lost
    if sys.platform == "win32":  # which sends it to all processes of a console
        signal.signal(signal.SIGBREAK, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where such a worker ends when its read does
        threading.Thread(target=_end_when_terminated_by, args=(parent,), daemon=True).start()


def _print_unless_connection_is_lost(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)


def _end_when_terminated_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
