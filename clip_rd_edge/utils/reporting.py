"""Progress of long work, in one shape for every layer: stage, step, total, message."""

from __future__ import annotations


class Reporter:
    """Receives the progress of long work. This one is silent; a console or a test overrides what it shows."""

    def begin(self, title: str, number: int, count: int) -> None:
        """A chapter of the work begins: `number` of `count`, counted from 1. Stages come within chapters."""

    def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
        """How far the current stage is.

        Args:
            stage: what is being done, such as `training`.
            step, total: steps done, and steps in all; None where the stage cannot be counted.
            message: figures beside the bar, such as the loss.
        """

    def say(self, message: str) -> None:
        """A decision or a result that stays on the screen, in one sentence."""


class PrefixedReporter(Reporter):
    """Puts a prefix before every stage, such as the tower that is being quantised."""

    def __init__(self, reporter: Reporter, prefix: str) -> None:
        self._reporter, self._prefix = reporter, prefix

    def begin(self, title: str, number: int, count: int) -> None:
        self._reporter.begin(f"{self._prefix}{title}", number, count)

    def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
        self._reporter.update(f"{self._prefix}{stage}", step, total, message)

    def say(self, message: str) -> None:
        self._reporter.say(message)


SILENT = Reporter()
