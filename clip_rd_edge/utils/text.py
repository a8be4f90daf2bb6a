"""Text in a form that may be shown, without what a terminal obeys or what is secret; and reports of progress."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Control characters but tab and newline: with ESC, a terminal changes its title, its clipboard or what it has shown.
# The others reorder or break the text around them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\udc80-\udc9f]")


def printable(text: str) -> str:
    """Return `text` with each control character as an escape, such as `\\x1b`."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def is_unicode(text: str) -> bool:
    """Return whether a text is of characters alone: Python also keeps halves of surrogate pairs, as of file names."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_unicode(text: str) -> str:
    """Return a text with what is not Unicode in it, such as the bytes of a path, as `\\udcXX`."""
    return text.encode(errors="backslashreplace").decode()


_LINE_BREAKS = {
    ord(character): character.encode("unicode_escape").decode() for character in "\n\r\t\v\f\x85\u2028\u2029"
}


def one_line(text: object) -> str:
    """Return a text, such as the path of a file, with line breaks and tabs escaped, so that it stays on its line."""
    return str(text).translate(_LINE_BREAKS)


def csv_row(*cells: str | int) -> str:
    """Return a row of CSV, without the end of its line.

    A text that a spreadsheet would compute as a formula comes after an apostrophe (OWASP, CSV injection).
    """
    row = io.StringIO()
    # Python before 3.13 quotes only those line breaks that are in the line terminator: a file's name can have either.
    csv.writer(row, lineterminator="\r\n").writerow(_inert(cell) if isinstance(cell, str) else cell for cell in cells)
    return row.getvalue().removesuffix("\r\n")


def _inert(text: str) -> str:
    return f"'{text}" if text.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r")) else text


def as_word(path: str | Path) -> str:
    """Return a path as a word of a command that people copy, quoted where a shell would take it apart."""
    import shlex

    text = str(path)
    text = f"./{text}" if text.startswith("-") else text  # which else is an option
    if os.name == "posix":
        return shlex.quote(text)
    return f'"{text}"' if set(text) & _TAKEN_APART else text  # in cmd as in PowerShell


_TAKEN_APART = set(" &()[]{}^=;!'+,`~@#")


_PIPE, _SOURCES = "pipe:", "::"  # as in open_clip: a command that writes a shard, and what is between several sources
_URL = re.compile(r"[a-zA-Z][\w+.-]*://[^\s'\"]+")
_SHARD = re.compile(r"[^\s/'\"?#&=;:@|<>()]*\.(?:tar(?:\.\w+)?|tgz)\}?(?=[\s'\"?#&;|<>()]|$)")


def shown_source(source: str) -> str:
    """Return an address of data, or several, as it may be shown and published: without what may be a secret.

    A URL loses user, password and query, such as a signature, and a command after `pipe:` all but the names of its
    shards. Anything else, such as a path, stays as it is.
    """
    return _SOURCES.join(map(_shown_part, source.split(_SOURCES)))


def shown_message(text: str) -> str:
    """Return the message of a library with each URL in it as `shown_source` gives it."""
    return _URL.sub(lambda match: _shown_url(match[0]), text)


def shown_sources(value: Any) -> Any:
    """Return dicts, lists, tuples, texts and numbers with each text as `shown_source` gives it, to publish them."""
    return each_text(value, shown_source)


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return dicts, lists, tuples, texts and numbers with each text, except the keys, as `change` returns it."""
    if isinstance(value, dict):
        return {key: each_text(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(each_text(entry, change) for entry in value)
    return change(value) if isinstance(value, str) else value


def _shown_part(source: str) -> str:
    address = source.strip()
    if address.startswith(_PIPE):
        shards = _SHARD.search(address)
        return shards[0] if shards else f"{_PIPE}…"
    return _shown_url(address) if "://" in address else source


def _shown_url(url: str) -> str:
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    address = authority.rpartition("@")[2] + slash + path
    return f"{scheme}://{re.split('[?#]', address)[0]}"


SEPARATOR_LINE = r"sep=[,\t;|](?:\r\n|\r|\n)"  # which tells Excel the separator, before the header


class Reporter:
    """Receives progress reports. This base class ignores them; a console or a test overrides its methods."""

    def begin(self, title: str, number: int, count: int) -> None:
        """Announce that chapter `number` of `count` begins, counted from 1. A chapter consists of stages."""

    def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
        """Report the progress of the current stage.

        Args:
            stage: the current activity, such as `training`.
            step, total: completed steps and total steps; None if the total is unknown.
            message: figures to show beside the progress bar, such as the loss.
        """

    def note(self, message: str) -> None:
        """Report a decision or a result, in one sentence that stays on the screen."""


def duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as `12 s`, `3 min 20 s` or `1 h`."""
    whole = round(seconds)
    for name, unit, next_name, next_unit in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= unit:
            rest = whole % unit // next_unit
            return f"{whole // unit:,} {name} {rest} {next_name}" if rest else f"{whole // unit:,} {name}"
    return f"{whole} s"


class PrefixedReporter(Reporter):
    """Adds a prefix to every chapter and stage, such as the tower being quantised."""

    def __init__(self, reporter: Reporter, prefix: str) -> None:
        self._reporter, self._prefix = reporter, prefix

    def begin(self, title: str, number: int, count: int) -> None:
        self._reporter.begin(f"{self._prefix}{title}", number, count)

    def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
        self._reporter.update(f"{self._prefix}{stage}", step, total, message)

    def note(self, message: str) -> None:
        self._reporter.note(message)


SILENT = Reporter()
