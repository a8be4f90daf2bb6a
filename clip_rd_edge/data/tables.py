"""Tables of image files and captions: CSV, TSV and Parquet of any number of rows.

A table is read once, row by row, into three parts, from which a pair is read when it is needed:

    rows       28 bytes per pair: where its text and its folder lie, and the CRC-32 of both
    texts      of each pair: name and size in bytes of its image, and its caption, separated by NUL
    folders    of the images, those that were met lately once

Those of a table of some 130,000 rows or fewer are kept in memory. A larger one is read into files of the cache, named
after its path, size and modification time, and mapped into memory: loader processes share them, and 15 million rows
cost as much as 15.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import msgspec
import numpy as np

from clip_rd_edge.data.samples import (
    GROUP_ROWS,
    INDEX,
    MAX_EXAMPLES,
    Counts,
    LocalFiles,
    Problems,
    Sample,
    Stored,
    kept_index,
)
from clip_rd_edge.errors import InputError, first_line, near_matches, needs_extra, quoted
from clip_rd_edge.utils.files import machine_failure
from clip_rd_edge.utils.paths import URL, is_file, why_no_file
from clip_rd_edge.utils.structs import is_list_of_texts, read_json, to_json
from clip_rd_edge.utils.text import SEPARATOR_LINE, SILENT, Reporter, is_unicode, shown_source

TABLE_STAGE = "indexing the table"
KEPT_ROWS = 1 << 17
"""Tables of some more rows are kept in the cache; smaller ones are read at each start."""
SEPARATORS = (",", "\t", ";", "|")  # Excel writes semicolons where the comma is the decimal sign

_FORMAT = "5"  # increase when the same table is indexed differently
_ROW = struct.Struct("<qqIII")  # text, folder, size of each, CRC-32
_PARTS = ("rows.bin", "texts.bin", "folders.bin")
_KNOWN_FOLDERS = 4096
_CHECKED_IMAGES = 1000  # of all, whenever a kept table is opened
_MAX_HEADER = 100_000  # bytes
_MAX_LINE_BYTES = 1 << 24  # csv refuses a field of such a length
_ROW_BYTES = 100  # about: a path and a caption
_BLOCK_ROWS = 1 << 14  # of Parquet
_BOM = b"\xef\xbb\xbf"
_MAGIC = b"PAR1"
_AS_UTF_8 = "save the table as UTF-8"
_HINT = "an image is a local file, with / between folders, relative to the working directory or the table"


class Pair(NamedTuple):
    """An image, its size in bytes, and its caption."""

    path: Path
    size: int
    caption: str


class _Index(msgspec.Struct, frozen=True):
    """What is known of all rows: how many are pairs, a digest of these without their folders, and the others."""

    pairs: int
    sha256: str
    problems: Problems


class Table(LocalFiles):
    """Pairs of a table; implements `data.samples.Samples`.

    Args:
        parts: rows, texts and folders: as bytes, or in the files of an index.
        captioned: whether the captions are the images'; otherwise, the samples are images alone.
    """

    def __init__(self, name: str, index: _Index, parts: Iterable[bytes | Path], *, captioned: bool) -> None:
        self.name, self.problems, self._index, self._captioned = name, index.problems, index, captioned
        self._rows, self._texts, self._folders = map(Stored, parts)
        if len(self._rows.view) != index.pairs * _ROW.size:
            raise self._rows.damage(index.pairs)

    def __len__(self) -> int:
        return self._index.pairs

    @property
    def counts(self) -> Counts:
        return Counts(pairs=len(self)) if self._captioned else Counts(images=len(self))

    def read(self, index: int) -> Sample:
        pair = self.pair(index)
        return Sample((pair.caption,) if self._captioned else (), pair.path)

    def identity(self) -> Iterator[bytes]:
        """Yield a digest of the images' names and sizes in bytes, and of the captions."""
        yield self._index.sha256.encode()

    def pair(self, index: int) -> Pair:
        """Return a pair as it was in the table; raises ConfigError if the kept table is damaged."""
        text, folder, text_size, folder_size, crc32 = _ROW.unpack_from(self._rows.view, index * _ROW.size)
        content, parent = self._texts.view[text : text + text_size], self._folders.view[folder : folder + folder_size]
        if zlib.crc32(content, zlib.crc32(parent)) != crc32:
            raise self._rows.damage(index)
        name, size, caption = bytes(content).decode().split("\0", 2)
        return Pair(Path(os.fsdecode(bytes(parent)), name), int(size), caption)

    def check_images(self) -> None:
        """Compare some images' sizes with those when the table was read; raises InputError if one differs."""
        for index in np.linspace(0, len(self) - 1, min(_CHECKED_IMAGES, len(self)), dtype=np.int64).tolist():
            pair = self.pair(index)
            size = pair.path.stat().st_size if pair.path.is_file() else None
            if size != pair.size:
                raise InputError(
                    f"The image {pair.path} of {self.name} {'is missing' if size is None else 'has changed'} since the "
                    "table was indexed.",
                    hint=f"check that this machine has the images, or touch {self.name} to have it indexed again",
                )


def load_table(path: Path, *, image_key: str, caption_key: str | None, reporter: Reporter = SILENT) -> Table:
    """Return the pairs of a table; arguments and errors as for `data.load.load_pairs`.

    A kept table is used again if its file is unchanged; some images' sizes are then compared with the files.

    Args:
        caption_key: None for the images alone, each once, however many captions it has.
        reporter: receives the number of rows of a table that is to be kept.
    """
    if not is_file(path):
        raise InputError(
            f"The data file {path} {why_no_file(path)}",
            hint="name a CSV file with the columns filepath,title, a folder of class folders, shards (….tar) or emoji",
            option="data",
        )
    status, parquet = path.stat(), is_parquet(path)
    count = status.st_size // _ROW_BYTES
    if parquet:
        with _opened(path) as file:
            count = file.metadata.num_rows
    columns = {image_key: "csv_img_key", **({} if caption_key is None else {caption_key: "csv_caption_key"})}
    rows = partial(parquet_rows if parquet else _csv_rows, path, columns)
    read = partial(_read, path, rows, caption_key=caption_key, unit="row" if parquet else "line")
    is_captioned = caption_key is not None
    if count <= KEPT_ROWS:
        parts = [io.BytesIO() for _ in _PARTS]
        index = read(parts, hint=_HINT)
        return Table(str(path), index, [part.getvalue() for part in parts], captioned=is_captioned)

    def progress(done: int) -> None:
        reporter.update(TABLE_STAGE, done, max(count, done))

    def build(folder: Path) -> None:
        with ExitStack() as stack:
            files = [stack.enter_context((folder / part).open("wb")) for part in _PARTS]
            index = read(files, hint=f"if images were added since, touch {path}", progress=progress)
        (folder / INDEX).write_bytes(to_json(index))

    # Relative paths of images depend on the working directory and on the folder of the table, which may be a link to it
    # in another folder, or lie in a folder that is a link.
    places = (path.resolve(), path.absolute(), path.parent.resolve(), Path.cwd())
    key = [_FORMAT, *map(str, places), str(status.st_size), str(status.st_mtime_ns), image_key, repr(caption_key)]
    folder = kept_index("table-indices", key, build)
    index = read_json(folder / INDEX, _Index)
    table = Table(str(path), index, map(folder.joinpath, _PARTS), captioned=is_captioned)
    table.check_images()
    return table


Rows = Iterator[tuple[int, str, str, str]]
"""Number of each row or line, from 1; image; caption; and what is wrong with the row, or empty."""


def _read(
    path: Path,
    rows: Callable[[_Finder], Rows],
    parts: Sequence[IO[bytes]],
    *,
    caption_key: str | None,
    unit: str,
    hint: str,
    progress: Callable[[int], None] = lambda done: None,
) -> _Index:
    finder, packer = _Finder(path), _Packer(parts)
    problems, examples, seen, done = 0, list[str](), set[int](), 0
    for done, (number, image, caption, problem) in enumerate(rows(finder), 1):
        if not done % GROUP_ROWS:
            progress(done)
        found = finder.image(image)
        reason = problem if found else finder.reason(image)
        if caption_key is not None:
            caption = caption.strip()
            if not reason and (not caption or is_list_of_texts(caption)):
                what = "a list; expected one row per caption" if caption else "empty"
                reason = f"the caption in column {caption_key!r} is {what}"
        elif image.strip():  # each row without an image counts, and each image once
            seen_before = len(seen)
            seen.add(hash(found or reason))
            if len(seen) == seen_before:
                continue
        if found and not reason:
            try:
                packer.add(*found, caption)
            except UnicodeEncodeError as error:
                raise InputError(f"{path}, {unit} {number}: it is not UTF-8 text.", hint=_AS_UTF_8) from error
        else:
            problems += 1
            examples += [f"{path}, {unit} {number}: {reason}"] if len(examples) < MAX_EXAMPLES else []
    progress(done)
    return _Index(packer.pairs, packer.digest.hexdigest(), Problems.of(examples, count=problems, hint=hint))


class _Packer:
    def __init__(self, parts: Sequence[IO[bytes]]) -> None:
        self._rows, self._texts, self._folders = parts
        self._text = self._folder = 0  # bytes so far
        self._known = dict[str, tuple[int, int, int]]()  # place, size and CRC-32 of folders
        self.pairs, self.digest = 0, hashlib.sha256()

    def add(self, folder: str, name: str, size: int, caption: str) -> None:
        """Add a pair; raises UnicodeEncodeError for what is not Unicode."""
        text = f"{name}\0{size}\0{caption}".encode()
        if folder not in self._known:
            if len(self._known) >= _KNOWN_FOLDERS:
                self._known.clear()
            content = os.fsencode(folder)
            self._known[folder] = self._folder, len(content), zlib.crc32(content)
            self._folder += self._folders.write(content)
        place, length, crc32 = self._known[folder]
        self._rows.write(_ROW.pack(self._text, place, len(text), length, zlib.crc32(text, crc32)))
        self._text += self._texts.write(text)
        self.digest.update(b"%d\0" % len(text) + text)  # with its size: captions are anything
        self.pairs += 1


class _Finder:
    """Looks for images: in the working directory, as open_clip does, or else in the table's folder."""

    def __init__(self, table: Path) -> None:
        # Plain texts: a Path per row would take ten times as long as looking for the file.
        self._folders = tuple(dict.fromkeys(str(Path(folder).absolute()) + os.sep for folder in (".", table.parent)))

    def image(self, name: str) -> tuple[str, str, int] | None:
        """Return folder, name and size in bytes of an image file, or None if there is no such file."""
        for folder in ("",) if os.path.isabs(name) else self._folders if name else ():  # noqa: PTH117
            try:
                status = os.stat(folder + name)  # noqa: PTH116
            except (OSError, ValueError) as error:  # a ValueError for a name with a NUL
                if failure := machine_failure(error):
                    raise failure from error
                continue
            if stat.S_ISREG(status.st_mode):
                return *os.path.split(folder + name), status.st_size
        return None

    def reason(self, name: str) -> str:
        """Return why there is no such image."""
        if not name.strip():
            return "it names no image"
        if URL.match(name):
            address = quoted(shown_source(name))
            return f"the image {address} is an address; a table names files: download them, or pack shards"
        places = "" if os.path.isabs(name) else f" in {' or '.join(map(os.path.dirname, self._folders))}"  # noqa: PTH117
        return f"there is no image file {quoted(name)}{places}"


class MissingColumnError(InputError):
    """A column was not found in a table."""


def _require_columns(path: Path, columns: Sequence[str], required: Mapping[str, str]) -> None:
    """Refuse a table that lacks one of these columns, or has several of its name; with the options that name them."""
    if not all(map(is_unicode, columns)):  # such as a workbook's
        raise InputError(f"{path} is not a table as UTF-8 text.", hint="save it as CSV in UTF-8, or as Parquet")
    for key, option in required.items():
        if key not in columns:
            raise MissingColumnError(
                f"{path} has no column {key!r}; its columns are {', '.join(map(repr, columns)) or 'none'}."
                f"{near_matches(key, columns)}",
                hint=f"name the column with {{{option}}}, or rename one to {key!r}",
                option=option,
            )


def _csv_rows(path: Path, columns: Mapping[str, str], finder: _Finder) -> Rows:
    """Yield the rows of a CSV or TSV file in open_clip's conventions, with the numbers of their last lines."""
    last = 0
    with path.open("rb") as file:
        try:
            separator, above = _begin(file, path, columns)
            reader = csv.reader(_lines(file), delimiter=separator, strict=True)
            last = above
            header = next(reader, [])
            _require_columns(path, header, columns)
            places, last = [header.index(key) for key in columns], above + reader.line_num
            for row in reader:
                first, last = last + 1, above + reader.line_num
                if not any(row):  # a blank line, which spreadsheets write as separators alone
                    continue
                row += [""] * (len(header) - len(row))
                if last > first:
                    _require_one_row(path, row, separator, places, finder, first)
                problem = ""
                if len(places) > 1 and any(row[len(header) :]):
                    problem = f"it has more fields than the header; a caption with {separator!r} needs quotes"
                yield last, row[places[0]], row[places[-1]], problem
        except csv.Error as error:
            hint = 'a quote that begins a field must end it, and is doubled within it: "a 5"" nail"'
            raise InputError(f"{path}, line {last + 1}: {error}.", hint=hint) from error


def _begin(file: BinaryIO, path: Path, columns: Mapping[str, str]) -> tuple[str, int]:
    """Go to the header of a CSV file; return its separator, and the number of lines above it."""
    head = file.read(_MAX_HEADER)
    start = len(_BOM) if head.startswith(_BOM) else 0
    if above := re.compile(SEPARATOR_LINE.encode()).match(head, start):
        start = above.end()
    header = (head[start:].splitlines() or [b""])[0].decode(errors="replace")
    file.seek(start)
    for separator in SEPARATORS:
        if columns.keys() <= set(next(csv.reader([header], delimiter=separator), ())):
            return separator, int(above is not None)
    return "\t" if path.suffix == ".tsv" else max(SEPARATORS, key=header.count), int(above is not None)


def _lines(file: BinaryIO) -> Iterator[str]:
    """Yield the lines of a file with any of the three line ends; bytes that are not UTF-8 as lone surrogates."""
    while line := file.readline(_MAX_LINE_BYTES):
        for part in line.splitlines(keepends=True) if b"\r" in line else (line,):
            yield part.decode(errors="surrogateescape")


def _require_one_row(
    path: Path, row: Sequence[str], separator: str, places: Sequence[int], finder: _Finder, number: int
) -> None:
    """Check that a row of several lines is one pair, and not several that a stray quote joined.

    A caption may hold line ends, but then none of its lines is a row with an image that exists. A column that is not
    used may list images; there, the line must also reach to the column, as one that a quote joined does.
    """
    image = places[0]
    for column, field in enumerate(row):
        for line in field.splitlines()[1:]:
            fields = line.split(separator)
            last = image if column in places else max(image, column)
            if last < len(fields) and finder.image(fields[image].strip('"')):
                raise InputError(
                    f"{path}, line {number}: a quoted field holds the row of the image {fields[image]!r}; expected a "
                    "quote at its end.",
                    hint="remove the stray quote, or quote the whole field and double each quote within it",
                )


def is_parquet(path: Path) -> bool:
    """Return whether a file is Parquet by its name or, as pandas' usual `pairs.parquet.gzip`, by its first bytes."""
    if path.suffix.lower() == ".parquet":
        return True
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def parquet_rows(path: Path, columns: Mapping[str, str], _finder: _Finder | None = None) -> Rows:
    """Yield the rows of a Parquet file."""
    number = 0
    with _opened(path) as file:
        _require_texts(path, file.schema_arrow, columns)
        # Neither threads nor reading ahead: memory stays bounded.
        for batch in file.iter_batches(_BLOCK_ROWS, columns=list(columns), use_threads=False):
            cells = [batch.column(key) for key in columns]
            for image, caption in zip(cells[0], cells[-1], strict=True):
                number += 1
                try:
                    yield number, image.as_py() or "", caption.as_py() or "", ""
                except UnicodeDecodeError as error:  # not all that write Parquet check their texts
                    raise InputError(f"{path}, row {number}: it is not UTF-8 text.", hint=_AS_UTF_8) from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with needs_extra("pyarrow", extra="parquet", purpose=f"Reading {path}"):
        import pyarrow
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} is damaged, or not a Parquet file: {first_line(error)}.") from error


def _require_texts(path: Path, schema: Any, columns: Mapping[str, str]) -> None:
    """Raise as `_require_columns`, and InputError if a column does not hold text."""
    _require_columns(path, schema.names, columns)
    for key, option in columns.items():
        kind = str(schema.field(key).type)
        if "string" not in kind or "<" in kind.replace("dictionary<", "", 1):
            into_files = "; or write the images of this one into files or WebDataset shards" if "binary" in kind else ""
            raise InputError(
                f"{path}: the column {key!r} holds {kind}; expected text, for images the paths of files.",
                hint=f"name a column of text with {{{option}}}{into_files}",
                option=option,
            )
