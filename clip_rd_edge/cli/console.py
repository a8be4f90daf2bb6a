"""Console output of the commands: tables on stdout, progress and messages on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import click
from rich.console import Console, ConsoleOptions
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from clip_rd_edge.cli.output import first_process
from clip_rd_edge.utils.text import Reporter, duration, printable


class SafeConsole(Console):
    """A console for text of unknown origin: strings are not markup, and control characters are escaped.

    Styles are `Text` objects.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            # Control segments move the cursor for the progress bar; their text comes from rich.
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


stderr = SafeConsole(stderr=True, quiet=not first_process)
_PIPED_WIDTH = 200  # columns; without a terminal, rich would wrap lines at 80
_PIPED_INTERVAL_S = 60.0  # min time between two lines of progress in a pipe or a file


def _columns(console: Console) -> int:
    """Return the number of columns of a console's terminal, 0 without one."""
    # FORCE_COLOR sets `is_terminal` in a pipe, too, where it asks for colours and not for lines of 80 columns.
    return console.width if console.file.isatty() else 0


def print_table(table: Table, *, console: Console | None = None, columns: int | None = None) -> None:
    """Print a table to stdout or another console, `columns` wide at most; in a pipe, no line is wrapped at 80."""
    console = console or SafeConsole()
    if not _columns(console):
        # Without a height, rich would take the width of a dumb terminal, which is 80.
        console = SafeConsole(width=_PIPED_WIDTH, height=console.height, file=console.file)
    console.print(table, width=columns and min(columns, console.width))


def table_width() -> int:
    """Return the number of columns that `print_table` has for a table on stdout."""
    return _columns(SafeConsole()) or _PIPED_WIDTH


class ConsoleReporter(Reporter):
    """Reports progress on stderr: messages, and a progress bar if it is enabled, else a line now and then.

    Chapters (`begin`) are numbered lines; messages within them are indented.
    """

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._stage = ""
        self._task: TaskID | None = None
        self._chapter_start: float | None = None
        self._piped = bar.disable
        self._next_line = 0.0  # when the next line of progress is due in a pipe

    def begin(self, title: str, number: int, count: int) -> None:
        self.end_chapter()
        self._chapter_start = time.perf_counter()
        self._print((f"{number}/{count}", "bold"), f" {printable(title)}")

    def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
        if self._piped:
            self._print_progress(stage, step, total, message)
        if stage != self._stage or self._task is None:
            self._clear()
            self._stage, self._task = stage, self._bar.add_task(printable(stage), total=total, message="", steps="")
        steps = f"{step:,}/{total:,}" if total else ""
        self._bar.update(self._task, completed=step, total=total, message=printable(message), steps=steps)

    def note(self, message: str) -> None:
        if self._chapter_start is None:
            self._print(("·", "dim"), f" {printable(message)}")
        else:
            self._print((f"    {printable(message)}", "dim"))

    def _print(self, *parts: str | tuple[str, str]) -> None:
        self._bar.console.print(Text.assemble(*parts), soft_wrap=True)  # not broken: it may hold a command to copy

    def end_chapter(self) -> None:
        if self._chapter_start is not None:
            self._clear()
            self.note(f"done in {duration(time.perf_counter() - self._chapter_start)}")

    def _print_progress(self, stage: str, step: int, total: int | None, message: str) -> None:
        """Print a line of progress, unless the last one is too recent: the first at once, so that a log shows life."""
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + _PIPED_INTERVAL_S
            count = f" {step:,}/{total:,}" if total else ""
            self.note(f"{stage}{count}{f', {message}' if message else ''}")

    def _clear(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


class _Times(ProgressColumn):
    def render(self, task: Task) -> Text:
        texts = [f"{duration(task.elapsed or 0)} elapsed"]
        if task.time_remaining is not None and not task.finished:
            texts.append(f"{duration(task.time_remaining)} left")
        return Text(", ".join(texts), style="progress.elapsed")


@contextmanager
def console_reporter() -> Iterator[ConsoleReporter]:
    """Return a reporter for the duration of a command; its progress bar disappears at the end.

    The bar, or the first line where none can be drawn, appears at once: importing PyTorch takes seconds, in which
    nothing else would be shown.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[steps]}", style="progress.download", table_column=Column(no_wrap=True)),
        _Times(Column(no_wrap=True)),
        TextColumn("{task.fields[message]}", markup=False),
    )
    redraws = stderr.is_terminal and not stderr.is_dumb_terminal and stderr.file.isatty()
    bar = Progress(*columns, console=stderr, disable=not redraws, transient=True)
    with bar if redraws else nullcontext():  # before version 14.3, its end writes a line even if it is disabled
        reporter = ConsoleReporter(bar)
        context = click.get_current_context(silent=True)
        reporter.update(f"starting {context.command_path.partition(' ')[2]}" if context else "starting")
        yield reporter
        reporter.end_chapter()
