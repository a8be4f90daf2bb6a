"""Trust follows who supplied a text, and not how it looks.

What the user typed in this call may be a command, a URL or any path, and is `Typed`; so are paths that this program
makes. What a file says (distillation.json, a run's config.yaml, a suite, an index) is a `str` or `Recorded`: whatever
opens a source, a model or a task takes neither.
"""

from __future__ import annotations

import os
from typing import NewType

Typed = NewType("Typed", str)


def typed(place: str | os.PathLike[str]) -> Typed:
    """Return what was typed in this call, or a path that this program made, as such: for callers that know that."""
    return Typed(os.fspath(place))


class Recorded:
    """A place that a file records, in a struct that is read from it: compared and shown, and never opened.

    It is no text, so that nothing that takes a path takes it either.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str | list[str]) -> None:
        self._value = value

    def plain(self) -> str | list[str]:
        """Return what the file says, to compare it, to show it and to write it again."""
        return self._value
