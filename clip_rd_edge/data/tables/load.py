"""Load the pairs of a table, into memory or through an index; the pairs are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from clip_rd_edge.bundle.image_files import look_at_images
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.data.samples import Pairs
from clip_rd_edge.data.tables.blocks import Table, read_blocks
from clip_rd_edge.data.tables.index import index_table
from clip_rd_edge.data.tables.packed import GROUP_ROWS
from clip_rd_edge.data.tables.parquet import is_parquet, open_parquet
from clip_rd_edge.data.tables.text import open_csv
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.paths import exists, is_file, is_folder, why_no_file
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.text import as_word

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
