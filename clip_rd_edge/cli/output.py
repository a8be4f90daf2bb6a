"""Plain output of the commands. Every command prints with `echo` and not with `click.echo`, which passes on escapes."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import IO, Any

import click

from clip_rd_edge.utils.text import Reporter, printable


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


def echo_json(content: Any, *, indented: bool = False) -> None:
    """Print structs, dicts and lists as JSON, in one line or indented."""
    from clip_rd_edge.utils.structs import encode_json, to_json

    echo(to_json(content) if indented else encode_json(content), nl=not indented)


@contextmanager
def results_whole() -> Iterator[None]:
    """Within the block, which prints, a full disk raises an error: the output is cut off."""
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
                f"What is printed is cut off: {error.strerror}.", hint="free some space, or print into a file elsewhere"
            ) from error
        raise


class LateReporter(Reporter):
    """A console that is set up with the first report: most runs have none, and answer sooner without it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    @cached_property
    def _console(self) -> Reporter:
        from clip_rd_edge.cli.console import console_reporter

        return self._stack.enter_context(console_reporter())

    def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
        self._console.update(stage, step, total, message)

    def note(self, message: str) -> None:
        self._console.note(message)


_PROGRAMS = "clip-rd-edge|pipx?|uv|python3?|npm|make|apt-get"
# A command, which runs to the end of the line or of its clause, or else a word.
_UNIT = re.compile(rf"(?:^|(?<=[:;] ))(?:\S*/)?(?:{_PROGRAMS}) .*?(?:, or(?= )|;(?= )|$)|\S+")
_INDENT = "  "  # of the lines after the first


def terminal_width(stream: IO[Any]) -> int:
    """Return the number of columns of a stream's terminal, 0 without one."""
    if not stream.isatty():
        return 0
    if (columns := os.environ.get("COLUMNS", "")).isdigit():
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def fold(text: str, width: int) -> str:
    """Break the lines of a text that are longer than `width` columns; 0 leaves them as they are.

    A terminal would break them in the middle of a word. It breaks commands all the same, which can then be copied.
    """
    lines = []
    for line in text.split("\n"):
        if not width or _cells(line) <= width:
            lines.append(line)
            continue
        start = line[: len(line) - len(line.lstrip(" "))]
        current = start
        for unit in _UNIT.findall(line.lstrip(" ")):
            if current.strip() and _cells(f"{current} {unit}") > width:
                lines.append(current)
                current = f"{start}{_INDENT}{unit}"
            else:
                current += f" {unit}" if current.strip() else unit
        lines.append(current)
    return "\n".join(lines)


def cut(text: str, width: int) -> str:
    """Return a text, cut to a line of `width` columns."""
    while width and _cells(text) > width:
        text = text[:-1]
    return text


def _cells(text: str) -> int:
    """Return the number of columns that a terminal needs for a text."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
