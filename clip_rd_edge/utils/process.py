"""The signals that ask a process to stop, who handles them, and the terminal that one of them takes away.

Python's handlers run in the main thread, and only between two of its instructions: while that thread is in native code,
such as a model with an endless loop, they wait. So a thread hears of the signals, too, and asks that code to return.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, suppress
from types import FrameType
from typing import Any, NoReturn


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


_PATIENCE_S, _PAUSE_S = 5.0, 0.05  # for native code to return that was asked to
_LISTEN_EVERY_S = 1.0
leave: Callable[[int], NoReturn] | None = None  # set by a command line: ends the process with an exit code
_calls: dict[int, NativeCall] = {}  # what runs, by thread
_sender, _listens_until = -1, 0.0


class NativeCall:
    """A block that runs native code, which `end_calls` ends, and in the main thread a stop signal.

    Several threads may enter one object. In a program that has a wake-up descriptor of its own, as event loops may,
    signals wait as ever.

    Args:
        end: asks the code to return, now or as soon as it begins; called in another thread.

    Attributes:
        is_ended: the code was asked to return.
        by_signal: by a signal, whose handler the program may survive.
    """

    def __init__(self, end: Callable[[], None] = lambda: None) -> None:
        self.end, self.is_ended, self.by_signal = end, False, False

    def __enter__(self) -> None:
        _calls[threading.get_ident()] = self
        if time.monotonic() > _listens_until and threading.current_thread() is threading.main_thread():
            with suppress(RuntimeError, ValueError):  # no further thread can be started; not Python's own main thread
                _listen()

    def __exit__(self, *_: object) -> None:
        _calls.pop(threading.get_ident(), None)


def end_calls(exit_code: int, over: threading.Event | None = None) -> threading.Event:
    """Ask the native code of all threads to return, also what begins later, until the event `over` is set.

    A command line ends with the exit code if some does not return.
    """
    over = over or threading.Event()

    def end_all() -> None:
        started = time.monotonic()
        while not over.is_set():
            for call in list(_calls.values()):
                _end(call, since=started, exit_code=exit_code)
            over.wait(_PAUSE_S)

    threading.Thread(target=end_all, daemon=True).start()
    return over


def end_running_calls(exit_code: int) -> None:
    """Ask the native code of all threads to return, and wait until it has; as `end_calls`."""
    over = end_calls(exit_code)
    while _calls:
        time.sleep(_PAUSE_S)
    over.set()


def _end(call: NativeCall, *, since: float, exit_code: int) -> None:
    call.is_ended = True
    call.end()
    if leave is not None and time.monotonic() > since + _PATIENCE_S:
        leave(exit_code)


def _listen() -> None:
    """Let a thread hear of signals; again and again, since an event loop may have come and gone."""
    global _sender, _listens_until
    if _sender < 0:
        receiver, _sender = os.pipe()
        if os.name != "nt":
            os.set_blocking(_sender, False)
        threading.Thread(target=_hear, args=(receiver,), daemon=True).start()
    previous = signal.set_wakeup_fd(_sender, warn_on_full_buffer=False)
    if previous not in (-1, _sender):
        signal.set_wakeup_fd(previous)
    _listens_until = time.monotonic() + _LISTEN_EVERY_S


def _hear(receiver: int) -> None:
    """End what the main thread runs when it gets a stop signal."""
    while received := set(os.read(receiver, 64)):
        started, main = time.monotonic(), threading.main_thread().ident or 0
        call, numbers = _calls.get(main), received.intersection(stop_signals())
        while numbers and call is not None and _calls.get(main) is call:
            call.by_signal = True
            _end(call, since=started, exit_code=128 + min(numbers))
            time.sleep(_PAUSE_S)


def _forget_calls() -> None:
    """Leave the calls, and the thread that hears of signals, to the parent of a forked process."""
    global _sender, _listens_until
    _calls.clear()
    if _sender >= 0:
        signal.set_wakeup_fd(-1)
        _sender, _listens_until = -1, 0.0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_calls)


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


class _Dropped(threading.local):
    """The level up to which records are dropped in this thread."""

    level: int = logging.NOTSET


_dropped = _Dropped()


@contextmanager
def quiet_logs(level: int) -> Iterator[None]:
    """Within the block, nothing up to this level is logged in this thread.

    `logging.disable` and the root logger's level hold for all threads: a host program would lose its own records.
    """
    outer, _dropped.level = _dropped.level, level
    try:
        with _THREADS_TOLD_APART:
            yield
    finally:
        _dropped.level = outer


@contextmanager
def _threads_told_apart() -> Iterator[None]:
    is_enabled, configure = logging.Logger.isEnabledFor, logging.basicConfig

    def is_enabled_here(self: logging.Logger, level: int) -> bool:
        return level > _dropped.level and is_enabled(self, level)

    def configure_elsewhere(**options: Any) -> None:
        # `logging.info` calls it, even if nothing is logged, where the root logger has no handler.
        if _dropped.level == logging.NOTSET:
            configure(**options)

    logging.Logger.isEnabledFor, logging.basicConfig = is_enabled_here, configure_elsewhere  # type: ignore[method-assign]
    try:
        yield
    finally:
        logging.Logger.isEnabledFor, logging.basicConfig = is_enabled, configure  # type: ignore[method-assign]


_THREADS_TOLD_APART = SharedBlock(_threads_told_apart)


# What Python code of the process writes to stderr, where converters draw their progress bars, is discarded.
WITHOUT_PROGRESS_BARS = SharedBlock(lambda: redirect_stderr(io.StringIO()))
