"""Pairs of image files and captions as bytes: how the index of a table stores them, and processes exchange them.

rows       28 bytes per pair: where its text and its folder lie, and the CRC-32 of both
texts      of each pair, separated by zeros: its image's name and size in bytes, number of captions, caption
folders    of the images, those of consecutive pairs once
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_rd_edge.bundle.image_files import look_at_images
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.data.samples import Pairs
from clip_rd_edge.data.shard_index import INDEX, Messages, damage, kept_index, ordered_map
from clip_rd_edge.data.tar import read_at
from clip_rd_edge.errors import InputError, MissingExtraError, first_line, near_matches, quoted
from clip_rd_edge.utils.files import machine_failure
from clip_rd_edge.utils.paths import URL, exists, is_file, is_folder, other_spellings, why_no_file
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import is_list_of_texts, read_json, to_json
from clip_rd_edge.utils.text import SEPARATOR_LINE, as_word, refuse_other_formats, shown_source

ROW = np.dtype([("text", "<i8"), ("folder", "<i8"), ("text_size", "<u4"), ("folder_size", "<u4"), ("crc32", "<u4")])
GROUP_ROWS = 4096
"""Rows that are shuffled as a group: image files lie apart, so that any block of rows serves."""
_SEPARATOR = "\0"  # in no file's name

Read = Callable[[int, int], bytes]
"""Returns as many bytes from an offset on: `read(size, offset)`."""


class Pair(NamedTuple):
    """Where an image is, its size in bytes, and its caption."""

    folder: str
    name: str
    size: int
    caption: str


@dataclass(frozen=True)
class PackedPairs:
    """N pairs; `rows` is (N,) of dtype ROW."""

    rows: npt.NDArray[np.void]
    texts: bytes
    folders: bytes

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Pair]:
        for i in range(len(self)):
            yield unpack(
                self.rows[i : i + 1].tobytes(),
                lambda size, offset: self.texts[offset : offset + size],
                lambda size, offset: self.folders[offset : offset + size],
            )

    def after(self, texts: int, folders: int) -> npt.NDArray[np.void]:
        """Return the rows for texts and folders that follow this many bytes of others."""
        rows = self.rows.copy()
        rows["text"] += texts
        rows["folder"] += folders
        return rows


def pack(pairs: Sequence[Pair]) -> PackedPairs:
    """Return pairs in packed form."""
    rows = np.empty(len(pairs), ROW)
    texts = [_SEPARATOR.join((pair.name, str(pair.size), "1", pair.caption)).encode() for pair in pairs]
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    rows["text"], rows["text_size"] = np.cumsum(sizes) - sizes, sizes
    folders: dict[str, tuple[int, int, int]] = {}
    content = bytearray()
    for folder in dict.fromkeys(pair.folder for pair in pairs):
        encoded = os.fsencode(folder)
        folders[folder] = (len(content), len(encoded), zlib.crc32(encoded))
        content += encoded
    if pairs:
        places = [folders[pair.folder] for pair in pairs]
        rows["folder"], rows["folder_size"], crc32s = np.asarray(places, np.int64).T
        rows["crc32"] = list(map(zlib.crc32, texts, crc32s.tolist()))
    return PackedPairs(rows, b"".join(texts), bytes(content))


def unpack(row: bytes, read_text: Read, read_folder: Read) -> Pair:
    """Return the pair of a row, whose text and folder are read by these functions."""
    text, folder, text_size, folder_size, crc32 = np.frombuffer(row, ROW)[0].tolist()
    content, parent = read_text(text_size, text), read_folder(folder_size, folder)
    if zlib.crc32(content, zlib.crc32(parent)) != crc32:
        raise ValueError("a checksum differs")
    name, size, _, caption = content.decode().split(_SEPARATOR, 3)
    return Pair(os.fsdecode(parent), name, int(size), caption)


IMAGE_OPTION, CAPTION_OPTION = "{csv_img_key}", "{csv_caption_key}"
_NO_NAME = "it names no image"


class Fault(NamedTuple):
    """Why a block cannot be read from some row on."""

    number: int
    reason: str
    hint: str


@dataclass(frozen=True)
class Block:
    """The content of a block. Lines of CSV, and rows of Parquet, are numbered from 1.

    Attributes:
        pairs: the rows that are pairs.
        left_out: number and reason of each row that is none.
        count: how many lines or rows were read.
        end: byte of a CSV file at which the row after the block's last begins.
        fault: why the rest cannot be read, or None.
    """

    pairs: PackedPairs
    left_out: list[tuple[int, str]]
    count: int
    end: int = 0
    fault: Fault | None = None


class Table(Protocol):
    """A table that is read block by block. Places of blocks can be sent to other processes.

    Attributes:
        path: of the file.
        unit: what is numbered: a line or a row.
        rows: number of rows, which may be an estimate.
        count: number of blocks, which may be an estimate.
    """

    @property
    def path(self) -> Path: ...

    @property
    def unit(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def count(self) -> int: ...

    def places(self) -> Iterator[Any]:
        """Yield where each block is."""
        ...

    def read(self, place: Any) -> Block:
        """Read the block at a place."""
        ...

    def in_order(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Yield what `read` returned for all places, in their order, with the numbers of the whole file."""
        ...


def read_blocks(
    table: Table, blocks: Iterable[Block], *, images_once: bool = False
) -> Iterator[tuple[Block, list[str]]]:
    """Yield the blocks of a table with messages about their rows that are no pairs.

    Args:
        blocks: what `table.read` returned for `table.places()`.
        images_once: whether of several rows with one image, only the first counts, also among those that are no pairs;
            each row without one does.
    """
    seen = set[int]()
    for block in table.in_order(blocks):
        if block.fault:
            raise InputError(
                f"{table.path}, {table.unit} {block.fault.number}: {block.fault.reason}.", hint=block.fault.hint
            )
        counted = _with_new_images(block, seen) if images_once else block
        yield counted, [f"{table.path}, {table.unit} {number}: {reason}" for number, reason in counted.left_out]


def _with_new_images(block: Block, seen: set[int]) -> Block:
    """Return a block without the rows whose image is among those seen; adds its images to them, as hashes."""

    def is_new(image: object) -> bool:
        count = len(seen)
        seen.add(hash(image))
        return len(seen) > count

    new = [is_new((pair.folder, pair.name)) for pair in block.pairs]
    # Any other reason names the image.
    left_out = [(number, reason) for number, reason in block.left_out if reason == _NO_NAME or is_new(reason)]
    rows = block.pairs.rows[np.asarray(new, bool)]
    return replace(block, pairs=replace(block.pairs, rows=rows), left_out=left_out)


class PairFinder:
    """Makes pairs of rows. Images are in the working directory, as in open_clip, or else in the table's folder."""

    def __init__(self, table: Path, caption_key: str) -> None:
        self._table, self._caption_key = table, caption_key
        # Plain texts: a Path per row would take ten times as long as looking for the file.
        self._folders = tuple(dict.fromkeys(str(Path(folder).absolute()) + os.sep for folder in (".", table.parent)))

    def pair(self, name: str, caption: str) -> Pair | str:
        """Return the pair that a row is, or the reason why it is none."""
        image = self.image(name)
        if image is None:
            if not name.strip():
                return _NO_NAME
            if URL.match(name):
                address = quoted(shown_source(name))
                return f"the image {address} is an address; a table names files: download them, or pack shards"
            if any(_is_folder(folder + name) for folder in ("", *self._folders)):
                return f"the image {quoted(name)} is a folder"
            for other, difference in other_spellings(name):
                if self.image(other) is not None:
                    return f"the image {quoted(name)} does not exist; there is one {difference}"
            if Path(name).is_absolute():
                return f"the image {quoted(name)} does not exist"
            if len(self._folders) == 1:
                return f"the image {quoted(name)} does not exist in the working directory"
            return f"the image {quoted(name)} exists neither in the working directory nor in {self._table.parent}"
        caption = caption.strip()
        if not caption:
            return f"the caption in column {self._caption_key!r} is empty"
        if is_list_of_texts(caption):
            return f"the caption in column {self._caption_key!r} is a list; expected one row per caption"
        return Pair(*image, caption)

    def image(self, name: str) -> tuple[str, str, int] | None:
        """Return folder, name and size in bytes of an image file, or None if there is no such file."""
        for folder in ("",) if os.path.isabs(name) else self._folders if name else ():  # noqa: PTH117
            path = folder + name
            try:
                status = os.stat(path)  # noqa: PTH116
            except (OSError, ValueError) as error:  # a ValueError for a name with a NUL
                if failure := machine_failure(error):
                    raise failure from error
                continue
            if stat.S_ISREG(status.st_mode):
                return *os.path.split(path), status.st_size
        return None


def _is_folder(path: str) -> bool:
    try:
        return os.path.isdir(path)  # noqa: PTH112  # as above
    except ValueError:  # with a NUL, before Python 3.13
        return False


class MissingColumnError(InputError):
    """A table has no column of a name."""


def require_columns(path: Path, columns: Sequence[str], required: Mapping[str, str]) -> None:
    """Raise MissingColumnError if a table lacks a column, and InputError if it has several of that name.

    Args:
        required: by name, the options that name them.
    """
    for key, option in required.items():
        if key not in columns:
            raise MissingColumnError(
                f"{path} has no column {key!r}; its columns are {', '.join(map(repr, columns)) or 'none'}."
                f"{near_matches(key, columns)}",
                hint=f"name the column with {option}, or rename one to {key!r}",
            )
        if columns.count(key) > 1:  # pandas, and so open_clip, takes the first, and csv.DictReader the last
            raise InputError(
                f"{path} has {columns.count(key)} columns {key!r}; expected one.",
                hint=f"rename the others, or name another column with {option}",
            )


def numbered(block: Block, before: int) -> Block:
    """Return a block with line or row numbers of the whole file, of which `before` come before the block."""
    left_out = [(before + number, reason) for number, reason in block.left_out]
    fault = block.fault and block.fault._replace(number=before + block.fault.number)
    return Block(block.pairs, left_out, block.count, block.end, fault)


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


_SUFFIX, _MAGIC = ".parquet", b"PAR1"
_BLOCK_ROWS = 1 << 14


@dataclass(frozen=True)
class ParquetTable:
    """A Parquet file; implements `Table`. Its blocks are Arrow record batches, which are read in order."""

    path: Path
    image_key: str
    caption_key: str
    rows: int
    unit: str = "row"

    @property
    def count(self) -> int:
        """See `Table`."""
        return -(-self.rows // _BLOCK_ROWS)

    def places(self) -> Iterator[Any]:
        """See `Table`."""
        pyarrow, parquet = _import_pyarrow(self.path)
        # Neither threads nor reading ahead: memory stays bounded, and processes can be forked.
        try:
            with parquet.ParquetFile(self.path, memory_map=True) as file:
                yield from file.iter_batches(
                    _BLOCK_ROWS, columns=list({self.image_key, self.caption_key}), use_threads=False
                )
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{self.path} is damaged: {first_line(error)}.") from error

    def read(self, place: Any) -> Block:
        """See `Table`."""
        finder = PairFinder(self.path, self.caption_key)
        columns = [place.column(key) for key in (self.image_key, self.caption_key)]
        try:
            names, captions = (column.to_pylist() for column in columns)
        except UnicodeDecodeError:
            return Block(pack([]), [], 0, fault=_text_fault(columns))
        pairs, left_out = list[Pair](), list[tuple[int, str]]()
        for number, (name, caption) in enumerate(zip(names, captions, strict=True), 1):
            pair = finder.pair(name or "", caption or "")
            if isinstance(pair, str):
                left_out.append((number, pair))
            else:
                pairs.append(pair)
        return Block(pack(pairs), left_out, len(names))

    def in_order(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """See `Table`."""
        rows = 0
        for block in blocks:
            yield numbered(block, rows)
            rows += block.count


def is_parquet(path: Path) -> bool:
    """Return whether a file is Parquet by its name or, as pandas' usual `pairs.parquet.gzip`, by its first bytes."""
    if path.suffix.lower() == _SUFFIX:
        return True
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def open_parquet(path: Path, image_key: str, caption_key: str) -> ParquetTable:
    """Check that the columns are there and hold text; raises InputError if not."""
    rows = _rows_with(path, {image_key: IMAGE_OPTION, caption_key: CAPTION_OPTION})
    return ParquetTable(path, image_key, caption_key, rows)


def read_column(name: str, column: str) -> list[str]:
    """Return the texts of a column of captions, without empty ones."""
    path = Path(name)
    _rows_with(path, {column: CAPTION_OPTION})
    pyarrow, parquet = _import_pyarrow(path)
    try:
        cells = parquet.read_table(path, columns=[column], use_threads=False).column(column)
        values = cells.to_pylist()
    except UnicodeDecodeError as error:
        fault = _text_fault([cells])
        raise InputError(f"{path}, row {fault.number}: {fault.reason}.", hint=fault.hint) from error
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}.") from error
    texts = [value.strip() for value in values if value and value.strip()]
    if lists := [text for text in texts if is_list_of_texts(text)]:
        raise InputError(
            f"{path} has a list in its column {column!r}: {lists[0]!r}; expected one row per caption.",
            hint="write each caption into a row of its own",
        )
    if not texts:
        raise InputError(f"{path} has no text in its column {column!r}.", hint=f"name the column with {CAPTION_OPTION}")
    return texts


def _text_fault(columns: Sequence[Any]) -> Fault:
    """Return the first row of Arrow columns whose text is not UTF-8, which not all that write Parquet check."""
    rows = enumerate(zip(*columns, strict=True), 1)
    number = next(number for number, cells in rows if not all(map(_is_utf_8, cells)))
    return Fault(number, "it is not UTF-8 text", "save the table as UTF-8")


def _is_utf_8(cell: Any) -> bool:
    try:
        cell.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _rows_with(path: Path, columns: Mapping[str, str]) -> int:
    """Return the number of rows of a file that has these columns of text, by name the options that name them."""
    pyarrow, parquet = _import_pyarrow(path)
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} is not a Parquet file: {first_line(error)}.") from error
    require_columns(path, schema.names, columns)
    # The last is missing from older releases of pyarrow.
    names = ("is_string", "is_large_string", "is_string_view")
    texts = [getattr(pyarrow.types, name) for name in names if hasattr(pyarrow.types, name)]
    for key, option in columns.items():
        kind = schema.field(key).type
        content = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not any(is_text(content) for is_text in texts):
            has_images = option == IMAGE_OPTION and "binary" in str(kind)  # in a struct, in Hugging Face's data sets
            raise InputError(
                f"{path}: the column {key!r} holds {kind}; expected text, for images the paths of files.",
                hint=f"name a column of text with {option}"
                + (", or write the images of this one into files or WebDataset shards" if has_images else ""),
            )
    count: int = rows
    return count


def _import_pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", extra="parquet", purpose=f"Reading {path}") from error
    return pyarrow, pyarrow.parquet


TABLE_STAGE = "indexing the table"

_FORMAT = "4"  # increase when the same table is indexed differently
_ROWS, _TEXTS, _FOLDERS, _LEFT_OUT = "rows.bin", "texts.bin", "folders.bin", "left-out"
_CHECKED_IMAGES = 1000  # of all, whenever a kept index is opened


class _Index(msgspec.Struct, frozen=True):
    pairs: int
    left_out: int
    sha256: str


class IndexedTable:
    """Pairs of a table of any number of rows; implements `data.samples.Pairs`.

    Attributes:
        groups: numbers of pairs in blocks of rows: image files lie apart, so that any block serves.
        left_out: messages about rows without an existing image or a caption.
    """

    lost: ClassVar[int] = 0  # a table is read whole or not at all

    def __init__(self, name: str, index: Path) -> None:
        self.name, self._folder = name, index
        self._index = read_json(index / INDEX, _Index)
        count = self._index.pairs
        self.groups = np.full(-(-count // GROUP_ROWS), GROUP_ROWS, np.int64)
        if count % GROUP_ROWS:
            self.groups[-1] = count % GROUP_ROWS
        self.left_out: Sequence[str] = Messages(index / _LEFT_OUT, self._index.left_out) if self._index.left_out else ()
        self._open_files()
        if os.fstat(self._files[0]).st_size != count * ROW.itemsize:
            raise InputError(
                f"{index / _ROWS} has another size than its index says.", hint="delete it; it is made again"
            )

    def _open_files(self) -> None:
        # Opened here and not by the loader processes: those that are forked share the files, also removed ones.
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
        self._files = tuple(os.open(self._folder / name, flags) for name in (_ROWS, _TEXTS, _FOLDERS))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_files"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open_files()

    def __del__(self) -> None:
        for file in self.__dict__.pop("_files", ()):
            os.close(file)

    def __len__(self) -> int:
        return self._index.pairs

    def prefetch(self, groups: Sequence[int]) -> None:
        """Do nothing: the images are local files."""

    def open(self, index: int) -> Image.Image:
        """Return the image as RGB; raises InputError if it cannot be read."""
        pair = self.pair(index)
        return open_image(Path(pair.folder, pair.name))

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the caption."""
        return (self.pair(index).caption,)

    def identity(self) -> Iterator[bytes]:
        """Yield a digest of the images' names and sizes in bytes, and of the captions."""
        yield self._index.sha256.encode()

    def pair(self, index: int) -> Pair:
        """Return a pair as it was in the table; raises ConfigError if the index is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows, texts, folders = self._files
        row = read_at(rows, ROW.itemsize, index * ROW.itemsize)
        try:
            return unpack(row, partial(read_at, texts), partial(read_at, folders))
        except (ValueError, OverflowError, OSError) as error:  # of places that are not in the files
            raise damage(self._folder, index) from error

    def check_images(self) -> None:
        """Compare some images' sizes with those in the index; raises InputError if there is another one."""
        for index in np.linspace(0, len(self) - 1, min(_CHECKED_IMAGES, len(self)), dtype=np.int64).tolist():
            pair = self.pair(index)
            path = Path(pair.folder, pair.name)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise InputError(
                    f"The image {path} of {self.name} cannot be read: {error.strerror}; it was there when the table "
                    "was indexed.",
                    hint="check that this machine has the images, such as by a mounted folder",
                ) from error
            if size != pair.size:
                raise InputError(
                    f"The image {path} of {self.name} has {size:,} bytes; it had {pair.size:,} when the table was "
                    "indexed.",
                    hint=f"touch {self.name}: a table with another time is indexed again",
                )


def index_table(
    table: Table, *, key: Sequence[str], images_once: bool = False, reporter: Reporter = SILENT
) -> IndexedTable:
    """Return the pairs of a table through its index, from the cache if the table's file is unchanged.

    The table is read by several processes. Of an index in the cache, some images' sizes are compared with the files.

    Args:
        key: what the pairs depend on besides the file, such as the names of columns; a single one for `images_once`.
        images_once: see `read_blocks`.
        reporter: receives the number of indexed blocks.
    """
    status = table.path.stat()
    # Relative paths of images depend on the working directory and on the folder of the table, which may be a link to it
    # in another folder, or lie in a folder that is a link.
    places = (table.path.resolve(), table.path.absolute(), table.path.parent.resolve(), Path.cwd())
    identity = [_FORMAT, *map(str, places), str(status.st_size), str(status.st_mtime_ns), *key]
    build = partial(_build, table=table, images_once=images_once, reporter=reporter)
    pairs = IndexedTable(str(table.path), kept_index("table-indices", identity, build))
    pairs.check_images()
    return pairs


def _build(folder: Path, *, table: Table, images_once: bool, reporter: Reporter) -> None:
    count = left_out = done = 0
    digest = hashlib.sha256()
    with (
        (folder / _ROWS).open("wb") as rows_file,
        (folder / _TEXTS).open("wb") as texts_file,
        (folder / _FOLDERS).open("wb") as folders_file,
        (folder / _LEFT_OUT).open("wb") as messages_file,
        ordered_map(parallel=True) as block_map,
    ):
        blocks = block_map(table.read, table.places())
        for block, messages in read_blocks(table, blocks, images_once=images_once):
            reporter.update(TABLE_STAGE, done, max(table.count, done))
            pairs = block.pairs
            rows_file.write(pairs.after(texts_file.tell(), folders_file.tell()).tobytes())
            texts_file.write(pairs.texts)
            folders_file.write(pairs.folders)
            messages_file.write(Messages.encode(messages))
            # Each text with its size: captions are anything.
            digest.update(pairs.rows["text_size"].tobytes() + pairs.texts)
            count, left_out, done = count + len(pairs), left_out + len(messages), done + 1
    (folder / INDEX).write_bytes(to_json(_Index(count, left_out, digest.hexdigest())))
    reporter.update(TABLE_STAGE, done, done)


INDEXED_ROWS = 1 << 17
"""Tables of some more rows are indexed; smaller ones are read into memory at each start."""


@dataclass(frozen=True)
class TablePairs:
    """Pairs of image paths and captions in memory; implements `data.samples.Pairs`.

    Attributes:
        images: N paths.
        texts: N non-empty tuples of equivalent captions.
        left_out: messages about rows without an existing image or a caption.
    """

    name: str
    images: tuple[Path, ...]
    texts: tuple[tuple[str, ...], ...]
    left_out: tuple[str, ...] = ()
    lost: ClassVar[int] = 0  # a table is read whole or not at all

    def __len__(self) -> int:
        return len(self.images)

    @property
    def groups(self) -> Sequence[int]:
        """Sizes of blocks of rows."""
        return [min(GROUP_ROWS, len(self) - start) for start in range(0, len(self), GROUP_ROWS)]

    def prefetch(self, groups: Sequence[int]) -> None:
        """Do nothing: the images are local files."""

    def open(self, index: int) -> Image.Image:
        """Return the image as RGB; raises InputError if it cannot be read."""
        return open_image(self.images[index])

    def captions(self, index: int) -> tuple[str, ...]:
        """Return all captions."""
        return self.texts[index]

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify these pairs: the images' names and sizes in bytes, and the captions."""
        for path, captions in zip(self.images, self.texts, strict=True):
            size = path.stat().st_size if path.is_file() else -1
            name = path.name.encode(errors="surrogateescape")
            yield name + f"\0{size}\0{len(captions)}\0".encode() + "\0".join(captions).encode()


def table_pairs(path: Path, *, image_key: str, caption_key: str, reporter: Reporter = SILENT) -> Pairs:
    """Return the pairs of a table, from memory if it is small; arguments and errors as for `data.load.load_pairs`."""
    table = _open_table(path, image_key=image_key, caption_key=caption_key)
    if table.rows <= INDEXED_ROWS:
        return _in_memory(table)
    return index_table(table, key=[image_key, caption_key], reporter=reporter)


def table_images(path: Path, *, column: str, reporter: Reporter = SILENT) -> Pairs:
    """Return the images of a table, each once, however many captions it has; otherwise as `table_pairs`."""
    table = _open_table(path, image_key=column, caption_key=column)  # the path takes the place of the caption
    if table.rows <= INDEXED_ROWS:
        return _in_memory(table, images_once=True)
    return index_table(table, key=[column], images_once=True, reporter=reporter)


def read_table(path: Path, *, image_key: str, caption_key: str) -> TablePairs:
    """Read pairs from a table into memory; arguments and errors as for `data.load.load_pairs`.

    A row that is not a pair is left out with a message that names its line.
    """
    return _in_memory(_open_table(path, image_key=image_key, caption_key=caption_key))


def _open_table(path: Path, *, image_key: str, caption_key: str) -> Table:
    """Open a table and check its columns; arguments and errors as for `data.load.load_pairs`."""
    if not is_file(path):
        message = f"The data file {path} {why_no_file(path)}"
        if str(path).startswith("'") and str(path).endswith("'"):
            raise InputError(message, hint="use double quotes: Windows' cmd takes single ones for a part of the name")
        if exists(path) and not is_folder(path):
            raise InputError(message, hint="write it into a file: a table is read more than once")
        if is_folder(path) and next(look_at_images(path, on_unreadable=lambda error: None), None):
            images = f", or pass images and captions apart: {{images}} {as_word(path)} {{texts}} FILE"
        else:
            images = ""
        raise InputError(
            message, hint=f"name a CSV file with the columns filepath,title, shards (….tar) or emoji{images}"
        )
    if is_parquet(path):
        return open_parquet(path, image_key, caption_key)
    return open_csv(path, image_key, caption_key)


def _in_memory(table: Table, *, images_once: bool = False) -> TablePairs:
    images: list[Path] = []
    captions: list[tuple[str, ...]] = []
    left_out: list[str] = []
    for block, messages in read_blocks(table, map(table.read, table.places()), images_once=images_once):
        for pair in block.pairs:
            images.append(Path(pair.folder, pair.name))
            captions.append((pair.caption,))
        left_out += messages
    return TablePairs(str(table.path), tuple(images), tuple(captions), tuple(left_out))
