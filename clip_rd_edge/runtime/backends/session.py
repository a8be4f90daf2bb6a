"""What the engines beside ONNX Runtime share, whose models take the place of its sessions."""

from __future__ import annotations

from typing import NamedTuple

from clip_rd_edge.errors import UsageError

_MAX_REASON = 300  # characters


class NamedInput(NamedTuple):
    """An input of a model, as a session describes it."""

    name: str


def require_threads(threads: int | None) -> None:
    """Raise UsageError if a number of threads is less than 1; None leaves it to the engine."""
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; expected at least 1.")


def reason_of(error: Exception) -> str:
    """Return what an engine's error says in one line, without its full stop; drivers write whole pages."""
    return " ".join(str(error).split())[:_MAX_REASON].rstrip(".")
