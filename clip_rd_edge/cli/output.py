"""Plain output of the commands. Every command prints with `echo` and not with `click.echo`, which passes on escapes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from typing import IO, Any, TypeVar

import click

from clip_rd_edge.utils.text import Reporter, printable

R = TypeVar("R")
# Under torchrun, only the first process prints.
first_process = os.environ.get("RANK", "0") == "0"


def echo(message: object = "", *, err: bool = False, nl: bool = True, file: IO[Any] | None = None) -> None:
    """Print text or UTF-8 bytes; control characters in it are escaped on stderr and on a terminal.

    A pipe or a file gets the names of files as they are.
    """
    text = message.decode() if isinstance(message, bytes) else str(message)
    stream = file or (sys.stderr if err else sys.stdout)
    # With color=None, click would remove what looks like a colour from the names in a pipe.
    click.echo(printable(text) if err or stream.isatty() else text, file=stream, nl=nl, color=True)


def echo_json(content: Any, *, indented: bool = False) -> None:
    """Print structs, dicts and lists as JSON, in one line or indented."""
    from clip_rd_edge.utils.structs import encode_json, to_json

    echo(to_json(content) if indented else encode_json(content), nl=not indented)


def json_line(content: object) -> str:
    """Return one line of JSON, in UTF-8 unless a path in it is not UTF-8: its bytes are then \\udcXX escapes."""
    line = json.dumps(content, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(content)
    return line


def note(message: str) -> None:
    """Print a message to stderr, once for all processes of a run."""
    if first_process:
        echo(f"· {message}", err=True)


def reported(function: Callable[..., R], **given: Any) -> R:
    """Call a function that takes a reporter, and show its progress."""
    from clip_rd_edge.cli.console import console_reporter

    with console_reporter() as reporter:
        return function(**given, reporter=reporter)


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
