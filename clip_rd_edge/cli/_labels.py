"""Labels from a text file."""

from __future__ import annotations

from pathlib import Path

from clip_rd_edge.errors import InputError


def read_labels_file(path: Path) -> list[str]:
    """Labels, one a line; empty lines are passed over.

    Raises:
        InputError: no such file, not UTF-8, or no label in it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"Cannot read the labels {path}: {error.strerror or error}.", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The labels {path} are not UTF-8 text: {error.reason} at byte {error.start}.") from error
    labels = [line.strip() for line in lines if line.strip()]
    if not labels:
        raise InputError(f"{path} has no labels; expected one a line.")
    return labels
