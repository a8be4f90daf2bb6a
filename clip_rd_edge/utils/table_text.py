"""What tables of other programs begin with: Excel's line above the header, and formats that are no text."""

from __future__ import annotations

import re

from clip_rd_edge.errors import InputError

SEPARATOR_LINE = r"sep=[,\t;|](?:\r\n|\r|\n)"  # which tells Excel the separator, before the header
# First bytes of other formats, what they are, and what to do.
_OTHER_FORMATS = (
    (
        rb"PK\x03\x04",
        "is a zip archive or an Excel workbook, and not a table as text",
        "save the workbook as CSV in UTF-8, or unpack the archive",
    ),
    (rb"\x1f\x8b", "is compressed by gzip", "unpack it"),
    (rb"ARROW1|FEA1", "is an Arrow or Feather file", "save it as Parquet or CSV"),
)


def refuse_other_formats(name: str, head: bytes, formats: tuple[tuple[bytes, str, str], ...] = ()) -> None:
    """Raise InputError if a file is of another format, by its first bytes.

    Args:
        name: what the message calls the file.
        formats: further ones: a pattern of the first bytes, what the file is, and a hint.
    """
    for beginning, kind, hint in _OTHER_FORMATS + formats:
        if re.match(beginning, head):
            raise InputError(f"{name} {kind}.", hint=hint)
