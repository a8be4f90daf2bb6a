"""List the files of an uncompressed tar with plain reads of its headers, some ten times as fast as tarfile.

Shards of millions of samples are scanned once. tarfile builds an object with some twenty attributes per member; here a
member costs one read of 512 bytes. The checksums of many headers are verified together in numpy.

Understood: the formats v7, ustar, pax and GNU, with long names and sizes over 8 GiB. Sparse members are reported as
unreadable, since their content is not contiguous, and so are those whose extended header is malformed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np

BLOCK_BYTES = 512
UNREADABLE = -1  # offset of a member whose content is not contiguous, or is not known
_BATCH = 1024  # headers whose checksums are verified together
_MAX_EXTENSION_BYTES = 1 << 20  # of an extended header; real ones hold a path
_MAX_DIGITS = 20  # of the length of a record
_MAX_NAME_BYTES = 1024  # of a file: an index holds all names in as many bytes as the longest has
_CHECKSUM = slice(148, 156)
_REGULAR, _PAX, _LONG_NAME, _SPARSE = b"\x0007", b"xX", b"L", b"S"
_WITHOUT_CONTENT = b"123456"  # links, devices, folders and pipes: their size field, if any, counts no content
_FILES = _REGULAR + _SPARSE + _WITHOUT_CONTENT  # these end what an extended header says

TarFile = tuple[bytes, int, int]
"""A regular file in a tar: its name as stored, and the offset (or UNREADABLE) and size of its content in bytes."""


class _DamageError(Exception):
    """Scanning cannot go on; the message says why."""


class TarScan:
    """Iterates over the regular files of a tar, up to its end or to where it is damaged.

    Attributes, valid after the iteration:
        damage: where and how the tar is damaged, or empty.
        last_is_incomplete: whether the content of the last file is cut off.
        size_bytes: of the whole tar.

    Args:
        open_file: returns a new file descriptor of the tar, which is closed in the end.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, open_file: Callable[[], int]) -> None:
        self._open_file = open_file
        self.damage = ""
        self.last_is_incomplete = False
        self.size_bytes = 0

    def __iter__(self) -> Iterator[TarFile]:
        with open(self._open_file(), "rb", buffering=0) as file:  # noqa: PTH123  no path: it is open already
            headers = _Headers(file.fileno())
            self.size_bytes = headers.size_bytes
            for starts, blocks, files in headers:
                valid = _valid_checksums(blocks)
                if all(valid):
                    yield from filter(None, files)
                    continue
                first = valid.index(False)
                yield from filter(None, files[:first])
                self.damage, self.last_is_incomplete = f"the tar is damaged at byte {starts[first]:,}", False
                return
            self.damage, self.last_is_incomplete = headers.damage, headers.last_is_incomplete


class _Headers:
    """Iterates over the headers of a tar in batches: their offsets, the headers, and the files that they describe."""

    def __init__(self, file: int) -> None:
        self._file, self._end, self._start = file, os.fstat(file).st_size, 0
        self.size_bytes = self._end
        self._is_done = False
        # What an extended header says about the next file.
        self._name, self._size, self._is_unreadable = b"", -1, False
        self.damage, self.last_is_incomplete = "", False

    def __iter__(self) -> Iterator[tuple[list[int], list[bytes], list[TarFile | None]]]:
        while not self._is_done:
            starts: list[int] = []
            headers: list[bytes] = []
            files: list[TarFile | None] = []
            try:
                while len(starts) < _BATCH and not self._is_done:
                    self._read_plain_files(starts, headers, files)
                    self._read_other(starts, headers, files)
            except _DamageError as damage:
                self.damage, self._is_done = str(damage), True
            if starts:
                yield starts, headers, files

    def _read_plain_files(self, starts: list[int], headers: list[bytes], files: list[TarFile | None]) -> None:
        """Read on while headers are of the usual kind; nearly all are, so this loop takes nearly all the time."""
        if self._name or self._size >= 0 or self._is_unreadable:  # of the next file, by an extended header
            return
        file, start, last = self._file, self._start, self._end - BLOCK_BYTES
        while start <= last and len(starts) < _BATCH:
            header = read_at(file, BLOCK_BYTES, start)
            if len(header) < BLOCK_BYTES or header[156] != _REGULAR[1] or header[345]:
                break
            try:
                size = int(header[124:135], 8)
            except ValueError:
                break
            content = start + BLOCK_BYTES
            following = content + (size + BLOCK_BYTES - 1 & -BLOCK_BYTES)
            if size < 0 or content + size > self._end:
                break
            starts.append(start)
            headers.append(header)
            files.append((header[: header.find(0, 0, 100)] if not header[99] else header[:100], content, size))
            start = following
        self._start = start

    def _read_other(self, starts: list[int], headers: list[bytes], files: list[TarFile | None]) -> None:
        """Read one header of any kind."""
        start = self._start
        header = read_at(self._file, BLOCK_BYTES, start)
        if len(header) < BLOCK_BYTES:
            if start == 0:
                raise _DamageError("it is shorter than a header" if header else "it is empty")
            raise _DamageError(f"the tar ends at byte {self._end:,} without an end mark, so it may be cut off")
        if not any(header):
            self._is_done = True
            return
        kind, size, content = header[156], _size(header, start), start + BLOCK_BYTES
        starts.append(start)
        headers.append(header)
        files.append(None)
        if kind in _PAX or kind in _LONG_NAME:
            self._apply_extension(kind, content, size)
        elif kind in _REGULAR or kind in _SPARSE:
            name = self._name or _name(header)
            if len(name) > _MAX_NAME_BYTES:
                name, self._is_unreadable = name[:_MAX_NAME_BYTES], True
            size = self._size if self._size >= 0 else size
            if kind in _SPARSE:
                content = self._after_sparse_headers(header, content)
            self.last_is_incomplete = content + size > self._end
            is_readable = not (kind in _SPARSE or self._is_unreadable)
            files[-1] = (name, content if is_readable else UNREADABLE, size)
            if self.last_is_incomplete:
                raise _DamageError(f"the tar ends at byte {self._end:,}, within {name.decode(errors='replace')}")
        elif kind in _WITHOUT_CONTENT:
            size = 0
        if kind in _FILES:
            self._name, self._size, self._is_unreadable = b"", -1, False
        self._start = content + (size + BLOCK_BYTES - 1 & -BLOCK_BYTES)

    def _apply_extension(self, kind: int, offset: int, size: int) -> None:
        """Keep what an extended header says about the next file.

        That file is unreadable if the content is too large or malformed. Its own header is still where it should be, so
        the files after it are not lost.
        """
        if offset + size > self._end:
            raise _DamageError(f"the tar ends within an extended header at byte {offset:,}")
        if size > _MAX_EXTENSION_BYTES:
            self._is_unreadable = True
            return
        content = bytes(read_at(self._file, size, offset))
        if kind in _PAX:
            self._apply_pax(content)
        else:
            self._name = content.split(b"\0", 1)[0]

    def _apply_pax(self, records: bytes) -> None:
        """Keep the name, size and sparseness that records such as `b"12 path=x/y\n"` give the next file."""
        try:
            start = 0
            while start < len(records):
                space = records.index(b" ", start, start + _MAX_DIGITS)
                end = start + _natural(records[start:space])
                key, separator, value = records[space + 1 : end - 1].partition(b"=")
                if not separator or not space < end <= len(records):
                    raise ValueError
                if key == b"path":
                    self._name = value
                elif key == b"size":
                    self._size = _natural(value)
                elif key.startswith(b"GNU.sparse."):
                    self._is_unreadable = True
                    self._name = value if key == b"GNU.sparse.name" else self._name
                start = end
        except ValueError:
            self._is_unreadable = True

    def _after_sparse_headers(self, header: bytes, offset: int) -> int:
        """Return the offset after the further headers that old GNU tar writes for a file with many holes."""
        is_extended = header[482]
        while is_extended:
            block = read_at(self._file, BLOCK_BYTES, offset)
            if len(block) < BLOCK_BYTES:
                raise _DamageError(f"the tar ends within a header at byte {offset:,}")
            is_extended, offset = block[504], offset + BLOCK_BYTES
        return offset


def _seek_and_read(file: int, size: int, offset: int) -> bytes:
    os.lseek(file, offset, os.SEEK_SET)
    return os.read(file, size)


read_at: Callable[[int, int, int], bytes] = getattr(os, "pread", _seek_and_read)  # Windows has no pread
"""Return up to `size` bytes of an open file from `offset` on, as `read_at(file, size, offset)`."""


def _natural(text: bytes) -> int:
    """Return a number of decimal digits; raise ValueError for any other text."""
    if not text.isdigit():
        raise ValueError
    return int(text)


def _size(header: bytes, start: int) -> int:
    try:
        return int(header[124:135], 8)
    except ValueError:
        pass
    field = header[124:136]
    try:
        # Sizes of 8 GiB and more are stored in binary by GNU tar; others may be padded differently.
        size = (
            int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.split(b"\0", 1)[0].strip() or b"0", 8)
        )
    except ValueError:
        size = -1
    if size < 0:
        raise _DamageError(
            f"the tar is damaged at byte {start:,}" if start else "its first header is not that of a tar"
        )
    return size


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _valid_checksums(headers: list[bytes]) -> list[bool]:
    """Compare the checksum of each header: the sum of its bytes, with spaces in place of the checksum itself."""
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK_BYTES)
    stored = np.zeros(len(blocks), np.int64)
    for column in blocks[:, _CHECKSUM].T:  # octal digits, padded with spaces and NUL in various ways
        is_digit = (column >= ord("0")) & (column <= ord("7"))
        stored = np.where(is_digit, stored * 8 + column - ord("0"), stored)
    spaces = 8 * ord(" ")
    sums = blocks.sum(1, dtype=np.int64) - blocks[:, _CHECKSUM].sum(1, dtype=np.int64) + spaces
    valid = stored == sums
    if not valid.all():  # some old programs summed signed bytes
        sums -= 256 * ((blocks >= 128).sum(1) - (blocks[:, _CHECKSUM] >= 128).sum(1))
        valid |= stored == sums
    return list(valid.tolist())


def member_name(file: int, offset: int) -> str:
    """Return the name in the header before the content at `offset`, for messages; a long name may be cut."""
    return _name(read_at(file, BLOCK_BYTES, offset - BLOCK_BYTES)).decode(errors="replace")
