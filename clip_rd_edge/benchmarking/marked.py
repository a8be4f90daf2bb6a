"""Generated parts of a Markdown file: what stands between two marks is replaced, and nothing else."""

from __future__ import annotations

from pathlib import Path

from clip_rd_edge.contract.files import write_text
from clip_rd_edge.errors import InputError


def replace_marked(path: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- begin NAME … -->` and `<!-- end NAME -->` of a file; all else stays as it is.

    Raises:
        InputError: there is no such file, or it has not exactly one such pair of marks, in this order.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.", hint="check the path") from error
    begins = [number for number, line in enumerate(lines) if line.startswith(f"<!-- begin {name} ")]
    ends = [number for number, line in enumerate(lines) if line.strip() == f"<!-- end {name} -->"]
    if len(begins) != 1 or len(ends) != 1 or ends[0] < begins[0]:
        raise InputError(
            f"{path} has {len(begins)} lines that begin and {len(ends)} that end {name!r}; expected one of each.",
            hint=f"put '<!-- begin {name} -->' and '<!-- end {name} -->' on lines of their own",
        )
    write_text(path, "\n".join([*lines[: begins[0] + 1], text.strip("\n"), *lines[ends[0] :]]) + "\n")
