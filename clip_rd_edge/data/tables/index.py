"""The index of a large table, in files from which a pair is read when it is needed.

    index.json                           number of pairs, and a digest of them without their folders
    rows.bin, texts.bin, folders.bin     the pairs, see `data.tables.packed`
    left-out                             one message per row that is not a pair, as JSON lines

The index is named after the table's path, with and without links, its size and modification time. Nothing is kept in
memory, so loader processes share the pages of the files, and 15 million rows cost as much as 15.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
from PIL import Image

from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.data.shard_index import INDEX, Messages, damage, kept_index, ordered_map
from clip_rd_edge.data.tables.blocks import Table, read_blocks
from clip_rd_edge.data.tables.packed import GROUP_ROWS, ROW, Pair, unpack
from clip_rd_edge.data.tar import read_at
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import read_json, to_json

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
