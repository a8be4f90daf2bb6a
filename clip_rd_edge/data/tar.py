"""The files of an uncompressed tar, by plain reads of its headers, some ten times as fast as tarfile; and its samples.

Shards of millions of samples are scanned once. tarfile builds an object with some twenty attributes per member; here a
member costs one read of 512 bytes, and only unusual headers are parsed by tarfile.

Understood: the formats v7, ustar, pax and GNU, with long names and sizes over 8 GiB. Members whose extended header is
malformed, or marks them as sparse, are reported as unreadable; the sparse ones of old GNU tar are not understood.
"""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

UNREADABLE = -1  # offset of a member whose content is not contiguous, or is not known
_BLOCK = 512  # bytes
_MAX_EXTENSION_BYTES = 1 << 20  # of an extended header; real ones hold a path
_MAX_DIGITS = 20  # of the length of a record
_MAX_NAME_BYTES = 1024  # of a file: an index holds all names in as many bytes as the longest has
_REGULAR, _PAX, _LONG_NAME = (b"0", b"\0", b"7"), (b"x", b"X"), b"L"
_SPACES = 8 * b" "
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders and pipes, whatever their size

TarFile = tuple[bytes, int, int]
"""A regular file in a tar: its name as stored, and the offset (or UNREADABLE) and size of its content in bytes."""


class TarScan:
    """Iterates over the regular files of a tar, up to its end or to where it is damaged.

    Attributes, valid after the iteration:
        damage: where and how the tar is damaged, or empty.
        is_cut_off: whether the damage is that the file ends before its tar does.
        size_bytes: of the whole tar.

    Args:
        open_file: returns a new file descriptor of the tar, which is closed in the end.
    """

    def __init__(self, open_file: Callable[[], int]) -> None:
        self._open_file = open_file
        self.damage, self.is_cut_off, self.size_bytes = "", False, 0

    def __iter__(self) -> Iterator[TarFile]:
        with open(self._open_file(), "rb", buffering=0) as opened:  # noqa: PTH123  no path: it is open already
            file, start, stated = opened.fileno(), 0, _PLAIN
            end = self.size_bytes = os.fstat(file).st_size
            while True:
                header, content = read_at(file, _BLOCK, start), start + _BLOCK
                if len(header) < _BLOCK:
                    return self._cut_off("without an end mark")
                if not any(header):
                    return
                try:
                    kind, name, size = _plain(header) or _parsed(header)
                except tarfile.HeaderError:
                    self.damage = f"the tar is damaged at byte {start:,}"
                    return
                if kind in _REGULAR:
                    offset = content
                    if stated is not _PLAIN:
                        name, size = stated.name or name, size if stated.size < 0 else stated.size
                        is_readable, stated = stated.is_readable and len(name) <= _MAX_NAME_BYTES, _PLAIN
                        offset = content if is_readable else UNREADABLE
                    if content + size > end:
                        return self._cut_off(f"within {name.decode(errors='replace')}")
                    yield name[:_MAX_NAME_BYTES], offset, size
                elif kind in _WITHOUT_CONTENT:
                    size, stated = 0, _PLAIN
                elif kind in (*_PAX, _LONG_NAME):
                    if content + size > end:
                        return self._cut_off("within an extended header")
                    stated = _extended(stated, kind, size, read_at(file, min(size, _MAX_EXTENSION_BYTES), content))
                # A damaged size may be beyond what the system takes for an offset.
                start = min(content + (size + _BLOCK - 1 & -_BLOCK), end)

    def _cut_off(self, where: str) -> None:
        self.damage, self.is_cut_off = f"the tar ends at byte {self.size_bytes:,}, {where}; it may be cut off", True


def _plain(header: bytes) -> tuple[bytes, bytes, int] | None:
    """Return the kind, name and size in a header of the usual form, as nearly all are; None for others."""
    try:
        size, checksum = int(header[124:135], 8), int(header[148:154], 8)
    except ValueError:
        return None
    # The sum of all bytes, with spaces in the place of the checksum: Adler-32 holds one more, modulo 65,521.
    sums = zlib.adler32(header[:148] + _SPACES + header[156:]) & 0xFFFF
    if sums != (checksum + 1) % 65_521 or size < 0 or header[345]:
        return None
    return header[156:157], header[:100].split(b"\0", 1)[0], size


def _parsed(header: bytes) -> tuple[bytes, bytes, int]:
    """Return the kind, name and size in any header; raises tarfile.HeaderError."""
    info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    if info.size < 0:
        raise tarfile.HeaderError
    return info.type, info.name.encode(errors="surrogateescape"), info.size


class _Stated(NamedTuple):
    """What extended headers state about the next file."""

    name: bytes = b""
    size: int = -1
    is_readable: bool = True


_PLAIN = _Stated()


def _extended(stated: _Stated, kind: bytes, size: int, content: bytes) -> _Stated:
    """Return what is stated about the next file after an extended header.

    That file is unreadable if the content is too large or malformed. Its own header is still where it should be, so the
    files after it are not lost.
    """
    if size > len(content):
        return stated._replace(is_readable=False)
    if kind == _LONG_NAME:
        return stated._replace(name=content.split(b"\0", 1)[0])
    try:
        for key, value in _pax_records(content):
            if key == b"path":
                stated = stated._replace(name=value)
            elif key == b"size":
                stated = stated._replace(size=_natural(value))
            elif key.startswith(b"GNU.sparse."):
                stated = stated._replace(is_readable=False)
    except ValueError:
        return stated._replace(is_readable=False)
    return stated


def _seek_and_read(file: int, size: int, offset: int) -> bytes:
    os.lseek(file, offset, os.SEEK_SET)
    return os.read(file, size)


read_at: Callable[[int, int, int], bytes] = getattr(os, "pread", _seek_and_read)  # Windows has no pread
"""Return up to `size` bytes of an open file from `offset` on, as `read_at(file, size, offset)`."""


def _pax_records(records: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield key and value of records such as `b"12 path=x/y\n"`; raises ValueError if they are malformed."""
    start = 0
    while start < len(records):
        space = records.index(b" ", start, start + _MAX_DIGITS)
        end = start + _natural(records[start:space])
        key, separator, value = records[space + 1 : end - 1].partition(b"=")
        if not separator or not space < end <= len(records):
            raise ValueError
        yield key, value
        start = end


def _natural(text: bytes) -> int:
    if not text.isdigit():
        raise ValueError
    return int(text)


def member_name(file: int, offset: int) -> str:
    """Return the name in the header before the content at `offset`, for messages; a long name may be cut."""
    return read_at(file, 100, offset - _BLOCK).split(b"\0", 1)[0].decode(errors="replace")


Kind = Literal["image", "text", "json", "class", "synthetic", "augmentations", "arrays", "tensors"]
KINDS: tuple[Kind, ...] = ("image", "text", "json", "class", "synthetic", "augmentations", "arrays", "tensors")
PLAIN_KINDS = 4  # the others are of reinforced samples, see `distillation.reinforced`
# Of several images in a sample, the one whose suffix comes first here counts, as in open_clip.
_COLUMN_OF_SUFFIX = {
    b"jpg": 0, b"png": 0, b"jpeg": 0, b"webp": 0, b"txt": 1, b"json": 2, b"cls": 3,
    b"syn.json": 4, b"paug.json": 5, b"npz": 6, b"pth.gz": 7,
}  # fmt: skip
_COLUMNS = list(_COLUMN_OF_SUFFIX.values())
_RANKS = {suffix: rank for rank, suffix in enumerate(_COLUMN_OF_SUFFIX)}
_META = re.compile(rb"(?:.*/)?__[^/]*__(?:/|$|\.)")  # webdataset's metadata


def samples_of(files: Iterable[TarFile]) -> tuple[npt.NDArray[np.bytes_], npt.NDArray[np.int64]]:
    """Group the files of a tar into samples: consecutive files with the same name up to the first dot.

    Returns:
        Names of the G samples up to the first dot, (G,), UTF-8; and the offset and size in bytes of each kind of file,
        (G, K, 2); an offset of -1 means missing.
    """
    names, suffixes = list[bytes](), set[bytes]()  # suffixes of the last sample
    rows = list[tuple[int, int, int, int]]()  # sample, rank of the suffix, offset and size of files that count
    last = b""
    for name, offset, size in files:
        base = name.rfind(b"/") + 1
        dot = name.find(b".", base)
        # Hidden files, files without a suffix and webdataset's metadata are not part of a sample.
        if not base < dot < len(name) - 1 or (b"__" in name and _META.match(name)):
            continue
        sample, suffix = name[:dot], name[dot + 1 :].lower()
        # A repeated suffix starts a new sample: names are unique only within a tar, and tars get concatenated.
        if sample != last or suffix in suffixes:
            names.append(sample)
            suffixes.clear()
            last = sample
        suffixes.add(suffix)
        if (rank := _RANKS.get(suffix)) is not None:
            rows.append((len(names) - 1, rank, offset, size))
    places = np.asarray(rows, np.int64).reshape(-1, 4)
    ranks = np.unique(places[:, 1]).tolist()
    is_reinforced = any(_COLUMNS[rank] >= PLAIN_KINDS for rank in ranks)
    locations = np.full((len(names), len(KINDS) if is_reinforced else PLAIN_KINDS, 2), (-1, 0), np.int64)
    for rank in ranks[::-1]:  # so that of several images, the one that counts stays
        own = places[places[:, 1] == rank]
        locations[own[:, 0], _COLUMNS[rank]] = own[:, 2:]
    return np.asarray(names, np.bytes_), locations
