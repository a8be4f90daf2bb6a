"""Pairs of image files and captions as bytes: how the index of a table stores them, and processes exchange them.

rows       28 bytes per pair: where its text and its folder lie, and the CRC-32 of both
texts      of each pair, separated by zeros: its image's name and size in bytes, number of captions, caption
folders    of the images, those of consecutive pairs once
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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
