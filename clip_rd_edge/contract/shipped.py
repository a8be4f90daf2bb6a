"""Data and recipes that the wheel ships and a checkout has in its own folders: suites, device recipes."""

from __future__ import annotations

from pathlib import Path

from clip_rd_edge.errors import InputError

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """Where a shipped file or folder lies, by its path in the repository, such as `benchmarks/suites/quickstart.yaml`.

    Raises:
        InputError: nothing of that name is shipped.
    """
    for root in (_PACKAGE / "_shipped", _PACKAGE.parent):
        if (root / name).exists():
            return root / name
    raise InputError(f"clip-rd-edge ships no {name!r}.")
