"""Brace patterns for names of shards, as webdataset and open_clip take them: `{00000..00012}`, `{train,val}`."""

from __future__ import annotations

import re

from clip_rd_edge.errors import InputError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(pattern: str) -> list[str]:
    """All names that a pattern stands for, in its order; several braces give every combination.

    A range keeps leading zeros: `{08..11}` is 08, 09, 10, 11.

    Raises:
        InputError: a brace that holds neither a range of whole numbers nor a list, or one that stands alone.
    """
    found = _BRACES.search(pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise InputError(f"The pattern {pattern!r} has a brace without its partner.")
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [before + choice + rest for choice in _choices(found[1], pattern) for rest in expand_braces(after)]


def _choices(inside: str, pattern: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        if "," not in inside:
            raise InputError(
                f"{{{inside}}} in {pattern!r} is neither a range nor a list.",
                hint="write {00000..00012} or {train,val}",
            )
        return inside.split(",")
    first, last = numbers.groups()
    # As in a shell: leading zeros on either side set the width of all.
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) and max(len(first), len(last)) > 1 else 0
    step = 1 if int(first) <= int(last) else -1
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
