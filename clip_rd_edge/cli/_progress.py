"""Progress on stderr: a bar where somebody looks at it, nothing where stderr is a file or a pipe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Of the processes that torchrun starts, one speaks.
first_process = os.environ.get("RANK", "0") == "0"
stderr = Console(stderr=True, highlight=False, quiet=not first_process)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar with what is done of what, time passed and time left; `{task.fields[note]}` stands behind."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal, transient=True) as bar:
        yield bar


def say(sentence: str) -> None:
    """One line on stderr."""
    stderr.print(f"[dim]·[/dim] {sentence}", soft_wrap=True)
