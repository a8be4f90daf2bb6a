"""Plain output of the commands. Every command prints with `echo` and not with `click.echo`, which passes on escapes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import click

from clip_rd_edge.cli._fold import fold, terminal_width
from clip_rd_edge.utils.text import printable


def echo(
    message: object = "", *, err: bool = False, nl: bool = True, file: IO[Any] | None = None, prose: bool = False
) -> None:
    """Print text or UTF-8 bytes; control characters in it are escaped on stderr and on a terminal.

    A pipe or a file gets the names of files as they are. On stderr, which is for people, long lines fit the terminal;
    those of `prose` do on stdout, too, except the rows of Markdown's tables.
    """
    text = message.decode() if isinstance(message, bytes) else str(message)
    stream = file or (sys.stderr if err else sys.stdout)
    if err or stream.isatty():
        text = printable(text)
    # With color=None, click would remove what looks like a colour from the names in a pipe.
    if err or prose:
        width = terminal_width(stream)
        text = "\n".join(line if line.startswith("|") else fold(line, width) for line in text.split("\n"))
    with results_whole():
        click.echo(text, file=stream, nl=nl, color=True)


@contextmanager
def results_whole() -> Iterator[None]:
    """Within the block, which prints, a full disk is told as what it is there: what was printed so far is cut off."""
    try:
        yield
    except OSError as error:
        from clip_rd_edge.errors import DiskFullError
        from clip_rd_edge.utils.files import disk_full_error
        from clip_rd_edge.utils.process import discard_output

        if disk_full_error(error):
            with suppress(OSError, ValueError):  # what the buffer still holds would fail again at the end
                discard_output(sys.stdout.fileno())
            raise DiskFullError(
                f"What is printed is cut off: {error.strerror}.",
                hint="free some space, or print into a file elsewhere",
            ) from error
        raise
