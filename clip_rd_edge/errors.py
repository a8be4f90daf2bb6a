"""Every error that clip-rd-edge raises on purpose.

    ClipRdEdgeError          something went wrong; exit code 1
    ├── InterruptedRunError  stopped by a signal after saving; the same command goes on from there; exit code 75
    └── UsageError           what was asked cannot be done as asked; exit code 2
        ├── InputError       a file, picture, caption or table that does not fit
        ├── ConfigError      a recipe, suite or manifest that does not fit
        └── MissingExtraError  an optional dependency is not installed

A message says what was wrong, with its value and place, and what was expected; `hint` says what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClipRdEdgeError(Exception):
    """Root of the tree.

    Args:
        message: one sentence: what was wrong, with its value and place, and what was expected.
        hint: one sentence: what to do next, or empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class InterruptedRunError(ClipRdEdgeError):
    """A long run was stopped by a signal after its state was saved. 75 is EX_TEMPFAIL: try again."""

    exit_code = 75


class UsageError(ClipRdEdgeError):
    """What was asked cannot be done as asked; the user can mend it."""

    exit_code = 2


class InputError(UsageError):
    """A file, a picture, a caption or a table is missing or is not what was expected."""


class ConfigError(UsageError):
    """A recipe, suite, manifest or model configuration is not what was expected."""


class MissingExtraError(UsageError):
    """An optional dependency is needed and not installed."""

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed.",
            hint=f"pip install 'clip-rd-edge[{extra}]'",
        )


def near_matches(value: str, known: Iterable[str]) -> str:
    """` Did you mean 'a', 'b'?` for the names nearest to `value`, or an empty string."""
    matches = difflib.get_close_matches(value, list(known), n=3, cutoff=0.5)
    return f" Did you mean {', '.join(map(repr, matches))}?" if matches else ""
