"""Keep what libraries log in this thread from the log, while other threads, such as those of a host program, log on."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from clip_rd_edge.utils.shared_block import SharedBlock


class _Dropped(threading.local):
    """What is dropped in this thread: records up to a level, and whether those of loggers with a level of their own."""

    level: int = logging.NOTSET
    spares_configured: bool = False


_dropped = _Dropped()


@contextmanager
def quiet_logs(level: int, *, spare_configured: bool = False) -> Iterator[None]:
    """Within the block, nothing up to this level is logged in this thread.

    `logging.disable` and the root logger's level hold for all threads: a host program would lose its own records.

    Args:
        spare_configured: log what comes from loggers that inherit no level from the root logger, since their library,
            or the host, has set their own.
    """
    outer = _dropped.level, _dropped.spares_configured
    _dropped.level, _dropped.spares_configured = level, spare_configured
    try:
        with _THREADS_TOLD_APART:
            yield
    finally:
        _dropped.level, _dropped.spares_configured = outer


@contextmanager
def _threads_told_apart() -> Iterator[None]:
    is_enabled, configure = logging.Logger.isEnabledFor, logging.basicConfig

    def is_enabled_here(self: logging.Logger, level: int) -> bool:
        is_dropped = level <= _dropped.level and not (_dropped.spares_configured and _has_level(self))
        return not is_dropped and is_enabled(self, level)

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


def _has_level(logger: logging.Logger) -> bool:
    """Return whether a logger has a level of its own, or a parent below the root that has one."""
    while logger.parent is not None and not logger.level:
        logger = logger.parent
    return logger is not logging.root


_NO_PROGRESS_BARS = SharedBlock(lambda: redirect_stderr(io.StringIO()))


def without_progress_bars() -> SharedBlock:
    """Discard what Python code of the process writes to stderr, where converters draw their progress bars."""
    return _NO_PROGRESS_BARS
