"""Tables that are read block by block, so that several processes can read one table."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from clip_rd_edge.data.tables.packed import PackedPairs, Pair
from clip_rd_edge.errors import InputError, near_matches, quoted
from clip_rd_edge.utils.files import machine_failure
from clip_rd_edge.utils.paths import URL, other_spellings
from clip_rd_edge.utils.structs import is_list_of_texts
from clip_rd_edge.utils.text import shown_source

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
