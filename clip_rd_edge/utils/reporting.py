"""Progress reporting for long-running work, the same for every layer: stage, step, total, message."""

from __future__ import annotations


class Reporter:
    """Receives progress reports. This base class ignores them; a console or a test overrides its methods."""

    def begin(self, title: str, number: int, count: int) -> None:
        """Announce that chapter `number` of `count` begins, counted from 1. A chapter consists of stages."""

    def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
        """Report the progress of the current stage.

        Args:
            stage: the current activity, such as `training`.
            step, total: completed steps and total steps; None if the total is unknown.
            message: figures to show beside the progress bar, such as the loss.
        """

    def note(self, message: str) -> None:
        """Report a decision or a result, in one sentence that stays on the screen."""


def duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as `12 s`, `3 min 20 s` or `1 h`."""
    whole = round(seconds)
    for name, unit, next_name, next_unit in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= unit:
            rest = whole % unit // next_unit
            return f"{whole // unit:,} {name} {rest} {next_name}" if rest else f"{whole // unit:,} {name}"
    return f"{whole} s"


class PrefixedReporter(Reporter):
    """Adds a prefix to every chapter and stage, such as the tower being quantised."""

    def __init__(self, reporter: Reporter, prefix: str) -> None:
        self._reporter, self._prefix = reporter, prefix

    def begin(self, title: str, number: int, count: int) -> None:
        self._reporter.begin(f"{self._prefix}{title}", number, count)

    def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
        self._reporter.update(f"{self._prefix}{stage}", step, total, message)

    def note(self, message: str) -> None:
        self._reporter.note(message)


SILENT = Reporter()
