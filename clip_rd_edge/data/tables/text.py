"""Tables as text: CSV and TSV in open_clip's conventions.

A block is a part of the file between two line ends. Whether the line end before a block also ends a row, or lies within
a quoted caption, is known only when the block before has been read: see `CsvTable.in_order`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clip_rd_edge.data.tables.blocks import (
    CAPTION_OPTION,
    IMAGE_OPTION,
    Block,
    Fault,
    PairFinder,
    numbered,
    require_columns,
)
from clip_rd_edge.data.tables.packed import Pair, pack
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.text import SEPARATOR_LINE, refuse_other_formats

SEPARATORS = (",", "\t", ";", "|")  # Excel writes semicolons where the comma is the decimal sign
_MAX_HEADER = 100_000  # bytes
_BLOCK_BYTES = 1 << 21  # some 20,000 rows
_MAX_LINE_BYTES = 1 << 24
_ROW_BYTES = 100  # about: a path and a caption
_BOM = b"\xef\xbb\xbf"
_SEPARATOR_LINE = re.compile(SEPARATOR_LINE.encode())
_OTHER_FORMATS = (
    (rb"\xff\xd8\xff|\x89PNG", "is an image, and not a table", "name a table of images and captions"),
    (rb"\s*<(?:\?xml|!DOCTYPE|html)", "is XML or HTML, and not a table", "save it as CSV"),
    (rb"\s*[\[{]\s*[\[{\"]", "is JSON, and not a table", "write a CSV file with the columns filepath,title"),
)


@dataclass(frozen=True)
class CsvTable:
    """A CSV or TSV file; implements `Table`.

    Attributes:
        columns: names in the header.
        start: byte after the header.
        header_lines: number of lines of the header and above it.
    """

    path: Path
    image_key: str
    caption_key: str
    separator: str
    columns: tuple[str, ...]
    start: int
    header_lines: int
    unit: str = "line"

    @property
    def rows(self) -> int:
        """See `Table`."""
        return self.path.stat().st_size // _ROW_BYTES

    @property
    def count(self) -> int:
        """See `Table`."""
        return -(-(self.path.stat().st_size - self.start) // _BLOCK_BYTES)

    def places(self) -> Iterator[tuple[int, int]]:
        """Yield the first byte of each block and the one after its last; all but the first begin after a line end."""
        size, start = self.path.stat().st_size, self.start
        with self.path.open("rb") as file:
            while start < size:
                file.seek(start + _BLOCK_BYTES)
                file.readline(_MAX_LINE_BYTES)  # reading the block refuses a line that is longer
                stop = min(file.tell(), size)
                yield start, stop
                start = stop

    def read(self, place: tuple[int, int]) -> Block:
        """See `Table`; reads the rows that begin in the block."""
        start, stop = place
        finder = PairFinder(self.path, self.caption_key)
        image, caption = (self.columns.index(key) for key in (self.image_key, self.caption_key))
        fields, pairs, left_out, last = len(self.columns), list[Pair](), list[tuple[int, str]](), 0
        with self.path.open("rb") as file:
            file.seek(start)
            lines = _Lines(file, start)
            reader = csv.reader(lines, delimiter=self.separator, strict=True)

            def finish(fault: Fault | None = None) -> Block:
                return Block(pack(pairs), left_out, last, lines.end, fault)

            try:
                for row in reader:
                    first, last = last + 1, reader.line_num
                    if any(row):  # no blank line, which spreadsheets write as separators alone
                        row += [""] * (fields - len(row))
                        if last > first and (fault := self._joined_rows(row, finder, first)):
                            return finish(fault)
                        pair = finder.pair(row[image], row[caption])
                        cut_off = image != caption and any(row[fields:])  # of images alone, no caption is used
                        if not isinstance(pair, str) and cut_off:
                            pair = f"it has more fields than the header; a caption with {self.separator!r} needs quotes"
                        if isinstance(pair, str):
                            left_out.append((last, pair))
                        else:
                            pairs.append(pair)
                    if lines.end >= stop:
                        break
            except UnicodeDecodeError as error:
                reason = f"it is not UTF-8 text: {error.reason} at byte {lines.end + error.start:,} of the file"
                return finish(Fault(reader.line_num + 1, reason, "save the table as UTF-8"))
            except csv.Error as error:
                hint = 'a quote that begins a field must end it, and is doubled within it: "a 5"" nail"'
                return finish(Fault(last + 1, str(error), hint))
            return finish()

    def in_order(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """See `Table`.

        A block counts if the one before ended where it begins. Otherwise its first line ends a row of the one before,
        and the block is read again after that row.
        """
        end, lines = self.start, self.header_lines
        for (start, stop), block in zip(self.places(), blocks, strict=True):
            if end >= stop:
                continue
            in_place = block if end == start else self.read((end, stop))
            yield numbered(in_place, lines)
            end, lines = in_place.end, lines + in_place.count

    def _joined_rows(self, row: list[str], finder: PairFinder, number: int) -> Fault | None:
        """Check that a row of several lines is one pair, and not several that a stray quote joined.

        A caption may hold line ends, but then none of its lines is a row with an image that exists. A column that is
        not used may list images; there, the line must also reach to the column, as one that a quote joined does.
        """
        image, caption = (self.columns.index(key) for key in (self.image_key, self.caption_key))
        for column, field in enumerate(row):
            for line in field.splitlines()[1:]:
                fields = line.split(self.separator)
                last = image if column in (image, caption) else max(image, column)
                if last < len(fields) and finder.image(fields[image].strip('"')):
                    return Fault(
                        number,
                        f"a quoted field holds the row of the image {fields[image]!r}; expected a quote at its end",
                        "remove the stray quote, or quote the whole field and double each quote within it",
                    )
        return None


class _Lines(Iterator[str]):
    """The lines of a file as text, with any of the three line ends; `end` is the byte after those already given."""

    def __init__(self, file: io.BufferedReader, start: int) -> None:
        self.end = start
        self._lines = self._split(file)

    def __next__(self) -> str:
        line = next(self._lines)
        text = line.decode()
        self.end += len(line)
        return text

    @staticmethod
    def _split(file: io.BufferedReader) -> Iterator[bytes]:
        while line := file.readline(_MAX_LINE_BYTES):
            if len(line) == _MAX_LINE_BYTES:
                raise csv.Error(f"it has {_MAX_LINE_BYTES:,} bytes or more")
            if b"\r" in line:
                yield from line.splitlines(keepends=True)
            else:
                yield line


def open_csv(path: Path, image_key: str, caption_key: str) -> CsvTable:
    with path.open("rb") as file:
        head = file.read(_MAX_HEADER)
        start = len(_BOM) if head.startswith(_BOM) else 0
        _require_text(path, head[start:])
        above = 0
        if separator_line := _SEPARATOR_LINE.match(head, start):
            start, above = separator_line.end(), 1
        first_line = (head[start:].splitlines() or [b""])[0]
        header = first_line.decode(errors="replace")
        separator = _separator_of(path, header, {image_key, caption_key})
        file.seek(start)
        lines = _Lines(file, start)
        reader = csv.reader(lines, delimiter=separator, strict=True)
        try:
            columns = next(reader, [])
        except csv.Error as error:
            raise InputError(f"{path}, line {above + 1}: {error}.", hint="check the header: filepath,title") from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}, line {above + 1}: it is not UTF-8 text: {error.reason}.",
                hint="name a table, and save it as UTF-8 if it is one",
            ) from error
    require_columns(path, columns, {image_key: IMAGE_OPTION, caption_key: CAPTION_OPTION})
    return CsvTable(path, image_key, caption_key, separator, tuple(columns), lines.end, above + reader.line_num)


def _require_text(path: Path, head: bytes) -> None:
    """Refuse a file of another kind, by its first bytes without a mark of UTF-8."""
    refuse_other_formats(str(path), head, _OTHER_FORMATS)
    if b"\0" in (head.splitlines() or [b""])[0]:
        raise InputError(
            f"{path} is not UTF-8 text: its first line has NUL bytes, as UTF-16 has.", hint="save the table as UTF-8"
        )


def _separator_of(path: Path, header: str, keys: set[str]) -> str:
    """Return the separator that splits the header into columns with these names, else the one that seems likeliest."""
    for separator in SEPARATORS:
        if keys <= set(next(csv.reader([header], delimiter=separator), ())):
            return separator
    return "\t" if path.suffix == ".tsv" else max(SEPARATORS, key=header.count)
