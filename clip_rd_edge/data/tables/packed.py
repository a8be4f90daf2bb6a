"""Pairs of image files and captions as bytes: how the index of a table stores them, and processes exchange them.

rows       24 bytes per pair: where its text and its folder lie
texts      of each pair, separated by zeros: its image's name and size in bytes, number of captions, caption
folders    of the images, those of consecutive pairs once
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

ROW = np.dtype([("text", "<i8"), ("folder", "<i8"), ("text_size", "<u4"), ("folder_size", "<u4")])
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
    folders: dict[str, tuple[int, int]] = {}
    content = bytearray()
    for folder in dict.fromkeys(pair.folder for pair in pairs):
        encoded = os.fsencode(folder)
        folders[folder] = (len(content), len(encoded))
        content += encoded
    if pairs:
        rows["folder"], rows["folder_size"] = np.asarray([folders[pair.folder] for pair in pairs], np.int64).T
    return PackedPairs(rows, b"".join(texts), bytes(content))


def unpack(row: bytes, read_text: Read, read_folder: Read) -> Pair:
    """Return the pair of a row, whose text and folder are read by these functions."""
    text, folder, text_size, folder_size = np.frombuffer(row, ROW)[0].tolist()
    name, size, _, caption = read_text(text_size, text).decode().split(_SEPARATOR, 3)
    return Pair(os.fsdecode(read_folder(folder_size, folder)), name, int(size), caption)
