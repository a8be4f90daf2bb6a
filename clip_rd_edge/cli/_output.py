"""Tables on stdout, and a bar on stderr for each thing that is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.table import Table

from clip_rd_edge.cli._progress import progress_bar

Report = Callable[[str, int, int], None]  # what is being done, steps done, steps in all
_PIPED_WIDTH = 200  # columns; rich would break lines at 80 where stdout is no terminal


def print_table(table: Table) -> None:
    """Print a table to stdout, unbroken where stdout is a file or a pipe."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    console.print(table)


def plain_table(first: str, *others: str, left: Sequence[str] = ()) -> Table:
    """An empty table: names to the left, numbers below each other; the columns named in `left` are text, too."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


@contextmanager
def step_progress() -> Iterator[Report]:
    """What is being done, step by step; nothing where stderr is no terminal."""
    with progress_bar() as bar:
        step = bar.add_task("", note="", visible=False)
        current = ""

        def report(what: str, done: int, total: int) -> None:
            nonlocal current
            if what != current:
                bar.reset(step, description=what, visible=True)
                current = what
            bar.update(step, completed=done, total=total)

        yield report
