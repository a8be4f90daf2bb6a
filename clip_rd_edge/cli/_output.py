"""Tables on stdout, progress on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Report = Callable[[str, int, int], None]  # what is being done, steps done, steps in all
_PIPED_WIDTH = 200  # columns; rich would break lines at 80 where stdout is no terminal


def print_table(table: Table) -> None:
    """Print a table to stdout, unbroken where stdout is a file or a pipe."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    console.print(table)


@contextmanager
def progress_bar() -> Iterator[Report]:
    """A bar on stderr that names what is being done, with the time left; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bars: dict[str, int] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in bars:
                for finished in bars.values():
                    progress.update(finished, visible=False)  # type: ignore[arg-type]
                bars[what] = progress.add_task(what)
            progress.update(bars[what], completed=done, total=total)  # type: ignore[arg-type]

        yield report
