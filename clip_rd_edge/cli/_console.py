"""What commands print: tables on stdout, progress and decisions on stderr."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn
from rich.table import Table
from rich.text import Text

from clip_rd_edge.utils.reporting import Reporter

# Of the processes that torchrun starts, one speaks.
first_process = os.environ.get("RANK", "0") == "0"
stderr = Console(stderr=True, highlight=False, quiet=not first_process)
_PIPED_WIDTH = 200  # columns; rich would break lines at 80 where stdout is no terminal


def say(message: str) -> None:
    """One line on stderr."""
    stderr.print(f"[dim]·[/dim] {escape(message)}", soft_wrap=True)


def print_table(table: Table, *, console: Console | None = None) -> None:
    """Print a table to stdout, or to another console, unbroken where that is a file or a pipe."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH, file=console.file, highlight=False)
    console.print(table)


def plain_table(first: str, *others: str, left: Sequence[str] = ()) -> Table:
    """An empty table: names to the left, numbers below each other; the columns named in `left` are text, too."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


class ConsoleReporter(Reporter):
    """Progress on stderr: a bar where somebody looks at it, nothing where stderr is a file or a pipe; decisions always.

    Chapters (`begin`) are numbered lines, and what is said within them is indented.
    """

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._stage = ""
        self._task: TaskID | None = None
        self._began: float | None = None  # of the chapter

    def begin(self, title: str, number: int, count: int) -> None:
        self.end_chapter()
        self._began = time.perf_counter()
        self._bar.console.print(f"[bold]{number}/{count}[/bold] {escape(title)}")

    def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
        if stage != self._stage or self._task is None:
            self._clear()
            self._stage, self._task = stage, self._bar.add_task(escape(stage), total=total, message="")
        self._bar.update(self._task, completed=step, total=total, message=escape(message))

    def say(self, message: str) -> None:
        if self._began is None:
            say(message)
        else:
            self._bar.console.print(f"    [dim]{escape(message)}[/dim]", soft_wrap=True)

    def end_chapter(self) -> None:
        """Say how long the chapter took, where one had begun."""
        self._clear()
        if self._began is not None:
            self.say(f"done in {time.perf_counter() - self._began:.0f} s")

    def _clear(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


class _Count(ProgressColumn):
    """Steps done and in all; nothing for a stage that cannot be counted."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:,.0f}/{task.total:,.0f}" if task.total else "", style="progress.download")


@contextmanager
def console_reporter() -> Iterator[ConsoleReporter]:
    """A reporter for the length of a command, whose bar vanishes at its end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        _Count(),
        TimeElapsedColumn(),
        RemainingColumn(),
        TextColumn("{task.fields[message]}"),
    )
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal, transient=True) as bar:
        yield ConsoleReporter(bar)
