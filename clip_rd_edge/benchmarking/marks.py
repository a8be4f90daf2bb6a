"""Tables in a Markdown file that a command writes: what stands between two marks is replaced."""

from __future__ import annotations

from pathlib import Path

from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.io import write_text


def write_between_marks(document: Path, name: str, table: str) -> None:
    """Replace what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->` in a Markdown file.

    Raises:
        InputError: the file has no such marks.
    """
    begin_mark, end_mark = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not (begin and end):
        raise InputError(f"{document} has no lines {begin_mark} and {end_mark}, between which the table goes.")
    write_text(document, f"{before}{begin_mark}\n{table}\n{end_mark}{after}")
