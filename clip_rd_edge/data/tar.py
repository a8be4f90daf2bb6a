"""The files of an uncompressed tar, by plain reads of its headers, some ten times as fast as tarfile; and its samples.

Shards of millions of samples are scanned once. tarfile builds an object with some twenty attributes per member; here a
member costs one read of 512 bytes. Checksums of many headers are compared together in numpy.

Understood: the formats v7, ustar, pax and GNU, with long names and sizes over 8 GiB. Members whose extended header is
malformed, or marks them as sparse, are reported as unreadable; the sparse ones of old GNU tar are not understood.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

UNREADABLE = -1  # offset of a member whose content is not contiguous, or is not known
_BLOCK = 512  # bytes
_BATCH = 1024  # headers that are looked at together
_MAX_EXTENSION_BYTES = 1 << 20  # of an extended header; real ones hold a path
_MAX_DIGITS = 20  # of the length of a record
_MAX_NAME_BYTES = 1024  # of a file: an index holds all names in as many bytes as the longest has
_MAX_SIZE = 1 << 62  # of a file, in bytes: more than any disk holds, and a number of 64 bits
_SIZE, _CHECKSUM, _KIND, _PREFIX = slice(124, 135), slice(148, 156), 156, 345  # where they are in a header
_PLAIN = ord("0")
_REGULAR, _PAX, _LONG_NAME = b"\x0007", b"xX", b"L"
_WITHOUT_CONTENT = b"123456"  # links, devices, folders and pipes: their size field, if any, counts no content

TarFile = tuple[bytes, int, int]
"""A regular file in a tar: its name as stored, and the offset (or UNREADABLE) and size of its content in bytes."""


class _DamageError(Exception):
    """Scanning cannot go on; the message says why."""


class _CutOffError(_DamageError):
    """The file ends before its tar does."""


class TarScan:
    """Iterates over the regular files of a tar, many at a time, up to its end or to where it is damaged.

    Attributes, valid after the iteration:
        damage: where and how the tar is damaged, or empty.
        is_cut_off: whether the damage is that the file ends before its tar does.
        last_is_incomplete: whether the content of the last file is cut off.
        size_bytes: of the whole tar.

    Args:
        open_file: returns a new file descriptor of the tar, which is closed in the end.
    """

    def __init__(self, open_file: Callable[[], int]) -> None:
        self._open_file = open_file
        self.damage, self.is_cut_off, self.last_is_incomplete, self.size_bytes = "", False, False, 0

    def __iter__(self) -> Iterator[list[TarFile]]:
        with open(self._open_file(), "rb", buffering=0) as file:  # noqa: PTH123  no path: it is open already
            headers = _Headers(file.fileno())
            self.size_bytes, is_done, damage = headers.end, False, _DamageError()
            while not is_done:
                batch = _Batch()
                try:
                    while len(batch.headers) < _BATCH and not is_done:
                        headers.read_plain(batch)
                        is_done = headers.read_other(batch)
                except _DamageError as error:
                    damage, is_done = error, True
                sound = _count_of_sound(batch.headers)
                yield [member for member in batch.files[:sound] if member is not None]
                if sound < len(batch.headers):
                    self.damage = f"the tar is damaged at byte {batch.starts[sound]:,}"
                    return
            self.damage, self.is_cut_off = str(damage), isinstance(damage, _CutOffError)
            self.last_is_incomplete = headers.last_is_incomplete


class _Batch:
    """Consecutive headers of a tar, the offset of each, and the regular file that it describes."""

    def __init__(self) -> None:
        self.headers, self.starts, self.files = list[bytes](), list[int](), list[TarFile | None]()

    def add(self, header: bytes, start: int) -> None:
        """Add a header that is not known to be a file's."""
        self.headers.append(header)
        self.starts.append(start)
        self.files.append(None)


class _Headers:
    """Reads one header after another; what an extended one states applies to the next file."""

    def __init__(self, file: int) -> None:
        self._file, self.end, self._start = file, os.fstat(file).st_size, 0
        self._name, self._size, self._is_unreadable = b"", -1, False  # of the next file
        self.last_is_incomplete = False

    def read_plain(self, batch: _Batch) -> None:
        """Read on while headers are of the usual kind; nearly all are, so this loop takes nearly all the time."""
        if self._name or self._size >= 0 or self._is_unreadable:
            return
        file, start, end = self._file, self._start, self.end
        headers, starts, files = batch.headers, batch.starts, batch.files
        with contextlib.suppress(IndexError, ValueError):  # less than a header, or no octal size
            for _ in range(_BATCH - len(headers)):
                header = read_at(file, _BLOCK, start)
                if header[_KIND] != _PLAIN or header[_PREFIX]:
                    break
                size = int(header[_SIZE], 8)
                following = start + (size + 2 * _BLOCK - 1 & -_BLOCK)
                if size < 0 or following > end:
                    break
                headers.append(header)
                starts.append(start)
                files.append((header[:100].split(b"\0", 1)[0], start + _BLOCK, size))
                start = following
        self._start = start

    def read_other(self, batch: _Batch) -> bool:
        """Read one header of any kind, unless the batch is full; return whether it is the end mark."""
        if len(batch.headers) >= _BATCH:
            return False
        start, header = self._start, read_at(self._file, _BLOCK, self._start)
        if len(header) < _BLOCK:
            short = "it is shorter than a header" if header else "it is empty"
            cut = f"the tar ends at byte {self.end:,} without an end mark, so it may be cut off"
            raise _CutOffError(cut if start else short)
        if not any(header):
            return True
        kind, size, content = header[_KIND], _size(header, start), start + _BLOCK
        batch.add(header, start)
        if kind in _PAX or kind in _LONG_NAME:
            self._apply_extension(kind, content, size)
        elif kind in _REGULAR:
            name = self._name or _name(header)
            is_readable = not self._is_unreadable and len(name) <= _MAX_NAME_BYTES
            size = min(self._size if self._size >= 0 else size, _MAX_SIZE)
            batch.files[-1] = name[:_MAX_NAME_BYTES], content if is_readable else UNREADABLE, size
            self.last_is_incomplete = content + size > self.end
            if self.last_is_incomplete:
                raise _CutOffError(f"the tar ends at byte {self.end:,}, within {name.decode(errors='replace')}")
        elif kind in _WITHOUT_CONTENT:
            size = 0
        if kind in _REGULAR + _WITHOUT_CONTENT:
            self._name, self._size, self._is_unreadable = b"", -1, False
        # A damaged size may be beyond what the system takes for an offset.
        self._start = min(content + (size + _BLOCK - 1 & -_BLOCK), max(content, self.end))
        return False

    def _apply_extension(self, kind: int, offset: int, size: int) -> None:
        """Keep what an extended header states about the next file.

        That file is unreadable if the content is too large or malformed. Its own header is still where it should be, so
        the files after it are not lost.
        """
        if offset + size > self.end:
            raise _CutOffError(f"the tar ends within an extended header at byte {offset:,}")
        if size > _MAX_EXTENSION_BYTES:
            self._is_unreadable = True
            return
        content = bytes(read_at(self._file, size, offset))
        if kind in _LONG_NAME:
            self._name = content.split(b"\0", 1)[0]
            return
        try:
            for key, value in _pax_records(content):
                if key == b"path":
                    self._name = value
                elif key == b"size":
                    self._size = _natural(value)
                elif key.startswith(b"GNU.sparse."):
                    self._is_unreadable = True
        except ValueError:
            self._is_unreadable = True


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


def _size(header: bytes, start: int) -> int:
    field, size = header[124:136], -1
    with contextlib.suppress(ValueError):
        # Sizes of 8 GiB and more are stored in binary by GNU tar; others may be padded differently.
        is_binary = field[0] == 0x80
        size = int.from_bytes(field[1:], "big") if is_binary else int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    if size < 0:
        raise _DamageError(
            f"the tar is damaged at byte {start:,}" if start else "its first header is not that of a tar"
        )
    return size


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if len(header) == _BLOCK and header[_PREFIX] and header[257:263] == b"ustar\0":
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _count_of_sound(headers: list[bytes]) -> int:
    """Return how many headers, from the first, have the sum of their bytes, with spaces in its place, as checksum."""
    if not headers:
        return 0
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _BLOCK)
    field = np.ascontiguousarray(blocks[:, _CHECKSUM].T).astype(np.int32)
    stored = np.zeros(len(blocks), np.int32)
    for column in field:  # octal digits, padded with spaces and NUL in various ways
        is_digit = (column >= ord("0")) & (column <= ord("7"))
        stored = np.where(is_digit, stored * 8 + column - ord("0"), stored)
    spaces = 8 * ord(" ")
    halves = blocks.reshape(len(blocks), 2, -1).sum(2, dtype=np.uint16)  # of 256 bytes, so that 16 bits hold their sum
    sums = halves[:, 0].astype(np.int32) + halves[:, 1] - field.sum(0, dtype=np.int32) + spaces
    valid: npt.NDArray[np.bool_] = stored == sums
    if not valid.all():  # some old programs summed signed bytes
        sums -= 256 * ((blocks >= 128).sum(1, dtype=np.int32) - (field >= 128).sum(0, dtype=np.int32))
        valid |= stored == sums
    return len(valid) if valid.all() else int(valid.argmin())


def member_name(file: int, offset: int) -> str:
    """Return the name in the header before the content at `offset`, for messages; a long name may be cut."""
    return _name(read_at(file, _BLOCK, offset - _BLOCK)).decode(errors="replace")


Kind = Literal["image", "text", "json", "class", "synthetic", "augmentations", "arrays", "tensors"]
COLUMNS: dict[Kind, int] = {"image": 0, "text": 1, "json": 2, "class": 3}
# Of reinforced samples, see `distillation.reinforced`: only shards that have such files have these columns.
REINFORCED_COLUMNS: dict[Kind, int] = {"synthetic": 4, "augmentations": 5, "arrays": 6, "tensors": 7}
# Of several images in a sample, the one whose suffix comes first here counts, as in open_clip.
_COLUMN_OF_SUFFIX = {
    b"jpg": 0, b"png": 0, b"jpeg": 0, b"webp": 0, b"txt": 1, b"json": 2, b"cls": 3,
    b"syn.json": 4, b"paug.json": 5, b"npz": 6, b"pth.gz": 7,
}  # fmt: skip
_COLUMNS = list(_COLUMN_OF_SUFFIX.values())
_RANKS = {suffix: rank for rank, suffix in enumerate(_COLUMN_OF_SUFFIX)}
_META = re.compile(rb"(?:.*/)?__[^/]*__(?:/|$|\.)")  # webdataset's metadata


class SampleGroups:
    """Groups the files of a tar into samples: consecutive files with the same name up to the first dot.

    Attributes:
        last_is_in_sample: whether the last file belongs to the last sample.
    """

    def __init__(self) -> None:
        self.last_is_in_sample = False
        self._names = list[bytes]()
        self._rows = list[
            tuple[int, int, int, int]
        ]()  # sample, rank of the suffix, offset and size of files that count
        self._suffixes = set[bytes]()  # of the last sample

    def __len__(self) -> int:
        return len(self._names)

    def add(self, files: Iterable[TarFile]) -> None:
        """Add the files that follow those added before."""
        names, rows, suffixes = self._names, self._rows, self._suffixes
        last = names[-1] if names else b""
        for name, offset, size in files:
            base = name.rfind(b"/") + 1
            dot = name.find(b".", base)
            # Hidden files, files without a suffix and webdataset's metadata are not part of a sample.
            self.last_is_in_sample = base < dot < len(name) - 1 and not (b"__" in name and _META.match(name))
            if not self.last_is_in_sample:
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

    def names(self, count: int) -> npt.NDArray[np.bytes_]:
        """Return the names of the first samples up to the first dot, (count,), UTF-8."""
        return np.asarray(self._names[:count], np.bytes_)

    def locations(self) -> npt.NDArray[np.int64]:
        """Return offset and size in bytes of each kind of file, (G, K, 2); an offset of -1 means missing."""
        rows = np.asarray(self._rows, np.int64).reshape(-1, 4)
        ranks = np.unique(rows[:, 1]).tolist()
        is_reinforced = any(_COLUMNS[rank] >= len(COLUMNS) for rank in ranks)
        columns = len(COLUMNS) + (len(REINFORCED_COLUMNS) if is_reinforced else 0)
        locations = np.full((len(self), columns, 2), (-1, 0), np.int64)
        for rank in ranks[::-1]:  # so that of several images, the one that counts stays
            files = rows[rows[:, 1] == rank]
            locations[files[:, 0], _COLUMNS[rank]] = files[:, 2:]
        return locations
