"""A long command on stderr, stage by stage: the `Watcher` of quickstart and evidence."""

from __future__ import annotations

import time

from rich.progress import Progress, TaskID


class StageBar:
    """A stage a line: its number, its title, a bar while it runs, how long it took."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._began = time.perf_counter()
        self._task: TaskID | None = None

    def stage(self, number: int, stages: int, title: str) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self.say(f"done in {time.perf_counter() - self._began:.0f} s")
        self._began = time.perf_counter()
        self._bar.console.print(f"[bold]{number}/{stages}[/bold] {title}")
        self._task = self._bar.add_task(title, total=None, note="")

    def progress(self, done: int, total: int, note: str) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)

    def say(self, sentence: str) -> None:
        self._bar.console.print(f"    [dim]{sentence}[/dim]", soft_wrap=True)
