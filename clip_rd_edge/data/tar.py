"""List the files of an uncompressed tar with plain reads of its headers, some ten times as fast as tarfile.

Shards of millions of samples are scanned once. tarfile builds an object with some twenty attributes per member; here a
member costs one read of 512 bytes. Names and checksums of many headers are looked at together in numpy.

Understood: the formats v7, ustar, pax and GNU, with long names and sizes over 8 GiB. Sparse members are reported as
unreadable, since their content is not contiguous, and so are those whose extended header is malformed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK_BYTES = 512
UNREADABLE = -1  # offset of a member whose content is not contiguous, or is not known
_BATCH = 1024  # headers that are looked at together
_MAX_EXTENSION_BYTES = 1 << 20  # of an extended header; real ones hold a path
_MAX_DIGITS = 20  # of the length of a record
_MAX_NAME_BYTES = 1024  # of a file: an index holds all names in as many bytes as the longest has
_MAX_SIZE = 1 << 62  # of a file, in bytes: more than any disk holds, and a number of 64 bits
_NAME_BYTES = 100
_SIZE, _CHECKSUM, _KIND, _PREFIX = slice(124, 135), slice(148, 156), 156, 345  # where they are in a header
_PLAIN = ord("0")
_REGULAR, _PAX, _LONG_NAME, _SPARSE = b"\x0007", b"xX", b"L", b"S"
_WITHOUT_CONTENT = b"123456"  # links, devices, folders and pipes: their size field, if any, counts no content
_FILES = _REGULAR + _SPARSE + _WITHOUT_CONTENT  # these end what an extended header says

TarFile = tuple[bytes, int, int]
"""A regular file in a tar: its name as stored, and the offset (or UNREADABLE) and size of its content in bytes."""


class TarFiles(NamedTuple):
    """Consecutive regular files of a tar, F of them, as columns."""

    names: npt.NDArray[np.bytes_]
    """As stored, (F,)."""
    offsets: npt.NDArray[np.int64]
    """Of their contents in bytes, or UNREADABLE, (F,)."""
    sizes: npt.NDArray[np.int64]
    """In bytes, (F,)."""


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
        self.damage = ""
        self.is_cut_off = False
        self.last_is_incomplete = False
        self.size_bytes = 0

    def __iter__(self) -> Iterator[TarFiles]:
        with open(self._open_file(), "rb", buffering=0) as file:  # noqa: PTH123  no path: it is open already
            headers = _Headers(file.fileno())
            self.size_bytes = headers.size_bytes
            for batch in headers:
                blocks = np.frombuffer(b"".join(batch.headers), np.uint8).reshape(-1, BLOCK_BYTES)
                valid = _valid_checksums(blocks)
                sound = len(valid) if valid.all() else int(valid.argmin())
                yield batch.files(blocks[:sound])
                if sound < len(valid):
                    self.damage = f"the tar is damaged at byte {batch.starts[sound]:,}"
                    return
            self.damage, self.is_cut_off = headers.damage, headers.is_cut_off
            self.last_is_incomplete = headers.last_is_incomplete


class _Batch:
    """Consecutive headers of a tar.

    Attributes:
        starts: offset of each header.
        sizes: of the content after it, where it is that of a plain file.
        others: by their position in the batch, all other headers: the file that each describes, or None.
    """

    def __init__(self) -> None:
        self.headers: list[bytes] = []
        self.starts: list[int] = []
        self.sizes: list[int] = []
        self.others: dict[int, TarFile | None] = {}

    def add_other(self, header: bytes, start: int) -> None:
        """Add a header that is not that of a plain file, nor yet known to be that of another one."""
        self.others[len(self.headers)] = None
        self.headers.append(header)
        self.starts.append(start)
        self.sizes.append(0)

    def describe_last(self, file: TarFile) -> None:
        """Say which file the header that was added last describes."""
        self.others[len(self.headers) - 1] = file

    def files(self, blocks: npt.NDArray[np.uint8]) -> TarFiles:
        """Return the files of the first headers, given as (H, 512) bytes."""
        count = len(blocks)
        names = _cut_at_nul(blocks[:, :_NAME_BYTES])
        offsets = np.asarray(self.starts[:count], np.int64) + BLOCK_BYTES
        sizes = np.asarray(self.sizes[:count], np.int64)
        others = {row: file for row, file in self.others.items() if row < count}
        if not others:
            return TarFiles(names, offsets, sizes)
        listed = names.tolist()
        for row, file in others.items():
            if file is not None:
                listed[row], offsets[row], sizes[row] = file
        is_file = np.ones(count, np.bool_)
        is_file[[row for row, file in others.items() if file is None]] = False
        return TarFiles(np.asarray(listed, np.bytes_)[is_file], offsets[is_file], sizes[is_file])


class _Headers:
    """Iterates over the headers of a tar in batches."""

    def __init__(self, file: int) -> None:
        self._file, self._end, self._start = file, os.fstat(file).st_size, 0
        self.size_bytes = self._end
        self._is_done = False
        # What an extended header says about the next file.
        self._name, self._size, self._is_unreadable = b"", -1, False
        self.damage, self.is_cut_off, self.last_is_incomplete = "", False, False

    def __iter__(self) -> Iterator[_Batch]:
        while not self._is_done:
            batch = _Batch()
            try:
                while len(batch.headers) < _BATCH and not self._is_done:
                    self._read_plain_files(batch)
                    if len(batch.headers) < _BATCH:
                        self._read_other(batch)
            except _DamageError as damage:
                self.damage, self.is_cut_off, self._is_done = str(damage), isinstance(damage, _CutOffError), True
            if batch.headers:
                yield batch

    def _read_plain_files(self, batch: _Batch) -> None:
        """Read on while headers are of the usual kind; nearly all are, so this loop takes nearly all the time.

        Names and checksums are left to numpy.
        """
        if self._name or self._size >= 0 or self._is_unreadable:  # of the next file, by an extended header
            return
        file, start, end = self._file, self._start, self._end
        headers, starts, sizes = batch.headers, batch.starts, batch.sizes
        with contextlib.suppress(IndexError, ValueError):  # less than a header, or no octal size
            for _ in range(_BATCH - len(headers)):
                header = read_at(file, BLOCK_BYTES, start)
                if header[_KIND] != _PLAIN or header[_PREFIX]:
                    break
                size = int(header[_SIZE], 8)
                following = start + (size + 2 * BLOCK_BYTES - 1 & -BLOCK_BYTES)
                if size < 0 or following > end:
                    break
                headers.append(header)
                starts.append(start)
                sizes.append(size)
                start = following
        self._start = start

    def _read_other(self, batch: _Batch) -> None:
        """Read one header of any kind."""
        start = self._start
        header = read_at(self._file, BLOCK_BYTES, start)
        if len(header) < BLOCK_BYTES:
            if start == 0:
                raise _CutOffError("it is shorter than a header" if header else "it is empty")
            raise _CutOffError(f"the tar ends at byte {self._end:,} without an end mark, so it may be cut off")
        if not any(header):
            self._is_done = True
            return
        kind, size, content = header[_KIND], _size(header, start), start + BLOCK_BYTES
        batch.add_other(header, start)
        if kind in _PAX or kind in _LONG_NAME:
            self._apply_extension(kind, content, size)
        elif kind in _REGULAR or kind in _SPARSE:
            name = self._name or _name(header)
            if len(name) > _MAX_NAME_BYTES:
                name, self._is_unreadable = name[:_MAX_NAME_BYTES], True
            size = min(self._size if self._size >= 0 else size, _MAX_SIZE)
            if kind in _SPARSE:
                content = self._after_sparse_headers(header, content)
            self.last_is_incomplete = content + size > self._end
            is_readable = not (kind in _SPARSE or self._is_unreadable)
            batch.describe_last((name, content if is_readable else UNREADABLE, size))
            if self.last_is_incomplete:
                raise _CutOffError(f"the tar ends at byte {self._end:,}, within {name.decode(errors='replace')}")
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
            raise _CutOffError(f"the tar ends within an extended header at byte {offset:,}")
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
                raise _CutOffError(f"the tar ends within a header at byte {offset:,}")
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
        return int(header[_SIZE], 8)
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
    if len(header) < BLOCK_BYTES:  # of a file that was cut since it was scanned
        return b""
    name = header[:_NAME_BYTES].split(b"\0", 1)[0]
    if header[_PREFIX] and header[257:263] == b"ustar\0":
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _cut_at_nul(fields: npt.NDArray[np.uint8]) -> npt.NDArray[np.bytes_]:
    """Return texts from fields that are padded with NUL, (H, L); what follows the first NUL does not count."""
    width = int(np.flatnonzero(fields.any(0)).max(initial=0)) + 1
    texts = np.ascontiguousarray(fields[:, :width])
    is_text = texts != 0
    if (is_text[:, 1:] > is_text[:, :-1]).any():
        texts = texts * np.logical_and.accumulate(is_text, axis=1)
    return texts.view(f"S{width}").ravel()


def _valid_checksums(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Compare the checksum of each header: the sum of its bytes, with spaces in place of the checksum itself."""
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
    return valid


def member_name(file: int, offset: int) -> str:
    """Return the name in the header before the content at `offset`, for messages; a long name may be cut."""
    return _name(read_at(file, BLOCK_BYTES, offset - BLOCK_BYTES)).decode(errors="replace")


Kind = Literal["image", "text", "json", "class", "synthetic", "augmentations", "arrays", "tensors"]
COLUMNS: dict[Kind, int] = {"image": 0, "text": 1, "json": 2, "class": 3}
# Of reinforced samples, see `data.reinforced`: only shards that have such files have these columns.
REINFORCED_COLUMNS: dict[Kind, int] = {"synthetic": 4, "augmentations": 5, "arrays": 6, "tensors": 7}
# Of several images in a sample, the one whose suffix comes first here counts, as in open_clip.
_COLUMN_OF_SUFFIX = {b"jpg": 0, b"png": 0, b"jpeg": 0, b"webp": 0, b"txt": 1, b"json": 2, b"cls": 3}
_REINFORCED_SUFFIXES = {b"syn.json": 4, b"paug.json": 5, b"npz": 6, b"pth.gz": 7}
_COLUMNS = np.asarray([*_COLUMN_OF_SUFFIX.values(), *_REINFORCED_SUFFIXES.values()])
_RANKS = {suffix: rank for rank, suffix in enumerate((*_COLUMN_OF_SUFFIX, *_REINFORCED_SUFFIXES))}
_SUFFIXES = list(_COLUMN_OF_SUFFIX)
_LENGTHS = np.asarray([len(suffix) for suffix in _SUFFIXES])
_SUFFIX_BYTES = 4  # that tell suffixes of the same length apart
_CODES = np.asarray([int.from_bytes(suffix, "little") for suffix in _SUFFIXES], np.uint32)
_META = re.compile(rb"(?:.*/)?__[^/]*__(?:/|$|\.)")  # webdataset's metadata
_GROUPED_TOGETHER = 1 << 13  # files
_DOT, _SLASH, _UNDERSCORE = b"./_"


def _joined(parts: Sequence[TarFiles]) -> TarFiles:
    return TarFiles(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class SampleGroups:
    """Samples and the locations of their files, collected from batches of files.

    Attributes:
        last_is_in_sample: whether the last file belongs to the last sample.
    """

    def __init__(self) -> None:
        self.last_is_in_sample = False
        self._count = 0
        self._names: list[npt.NDArray[np.bytes_]] = []
        # Sample, rank of the suffix, offset and size of files that count, (N, 4).
        self._rows: list[npt.NDArray[np.int64]] = []
        self._sample, self._suffixes = b"", set[bytes]()  # of the last sample

    def add_all(self, batches: Iterable[TarFiles]) -> None:
        """Add the files that follow those added before, in larger batches, which take less time for each file."""
        waiting: list[TarFiles] = []
        for files in batches:
            waiting.append(files)
            if sum(len(part.names) for part in waiting) >= _GROUPED_TOGETHER:
                self.add(_joined(waiting))
                waiting = []
        if waiting:
            self.add(_joined(waiting))

    def add(self, files: TarFiles) -> None:
        """Add the files that follow those added before."""
        start = self._leading(files)
        self._add_each(files, 0, start)
        if not self._add_usual(files, start):
            self._add_each(files, start, len(files.names))

    def names(self, count: int) -> npt.NDArray[np.bytes_]:
        """Return the names of the first samples up to the first dot, (count,), UTF-8."""
        names = np.concatenate(self._names)[:count] if self._names else np.empty(0, np.bytes_)
        width = int(np.char.str_len(names).max(initial=1))
        return names.astype(f"S{width}")

    def locations(self) -> npt.NDArray[np.int64]:
        """Return offset and size in bytes of each kind of file, (G, K, 2); an offset of -1 means missing."""
        rows = np.concatenate(self._rows) if self._rows else np.empty((0, 4), np.int64)
        is_reinforced = (rows[:, 1] >= len(_COLUMN_OF_SUFFIX)).any()
        columns = len(COLUMNS) + (len(REINFORCED_COLUMNS) if is_reinforced else 0)
        locations = np.full((self._count, columns, 2), (-1, 0), np.int64)
        for rank in np.unique(rows[:, 1])[::-1]:  # so that of several images, the one that counts stays
            files = rows[rows[:, 1] == rank]
            locations[files[:, 0], _COLUMNS[rank]] = files[:, 2:]
        return locations

    def __len__(self) -> int:
        return self._count

    def _leading(self, files: TarFiles) -> int:
        """Return how many files at the beginning may go on with the last sample."""
        count = 0
        while self._count and count < len(files.names) and files.names[count].startswith(self._sample + b"."):
            count += 1
        return count

    def _add_each(self, files: TarFiles, start: int, stop: int) -> None:
        """Add files of any name."""
        names: list[bytes] = []
        rows: list[tuple[int, int, int, int]] = []
        columns = (
            files.names[start:stop].tolist(),
            files.offsets[start:stop].tolist(),
            files.sizes[start:stop].tolist(),
        )
        for name, offset, size in zip(*columns, strict=True):
            base = name.rfind(b"/") + 1
            dot = name.find(b".", base)
            # Hidden files, files without a suffix and webdataset's metadata are not part of a sample.
            self.last_is_in_sample = base < dot < len(name) - 1 and not (b"__" in name and _META.match(name))
            if not self.last_is_in_sample:
                continue
            sample, suffix = name[:dot], name[dot + 1 :].lower()
            # A repeated suffix starts a new sample: names are unique only within a tar, and tars get concatenated.
            if sample != self._sample or suffix in self._suffixes:
                names.append(sample)
                self._count += 1
                self._sample, self._suffixes = sample, {suffix}
            else:
                self._suffixes.add(suffix)
            if suffix in _RANKS:
                rows.append((self._count - 1, _RANKS[suffix], offset, size))
        self._keep(np.asarray(names, np.bytes_), np.asarray(rows, np.int64).reshape(-1, 4))

    def _add_usual(self, files: TarFiles, start: int) -> bool:
        """Add files from `start` on if all are as usual, of which the first one begins a sample; return whether so."""
        names = files.names[start:]
        count, width = len(names), names.dtype.itemsize
        if not count:
            return True
        characters = np.zeros((count, width + _SUFFIX_BYTES), np.uint8)
        characters[:, :width] = names.view(np.uint8).reshape(count, width)
        columns = np.arange(characters.shape[1], dtype=np.int16)
        is_dot, slash = characters == _DOT, characters == _SLASH
        last_slash = np.full(count, -1, np.int16)
        if slash.any():
            last_slash = np.where(slash, columns, np.int16(-1)).max(1)
            is_dot &= columns > last_slash[:, None]
        dot = is_dot.argmax(1)
        suffix = characters[np.arange(count)[:, None], dot[:, None] + np.arange(1, _SUFFIX_BYTES + 1)]
        suffix[(suffix >= ord("A")) & (suffix <= ord("Z"))] |= 0x20  # to lower case
        code = suffix.view("<u4")
        kind = (code == _CODES).argmax(1)
        length = dot + 1 + _LENGTHS[kind]
        is_usual = (code[:, 0] == _CODES[kind]) & (dot > last_slash + 1) & (np.char.str_len(names) == length)
        underscore = characters == _UNDERSCORE
        if not is_usual.all() or (underscore[:, 1:] & underscore[:, :-1]).any():
            return False
        stems = (characters * (columns < dot[:, None].astype(np.int16))).view(f"S{characters.shape[1]}").ravel()
        begins = np.ones(count, np.bool_)
        begins[1:] = stems[1:] != stems[:-1]
        sample = np.cumsum(begins) - 1
        if np.bincount(sample * len(_SUFFIXES) + kind).max() > 1:  # a repeated suffix
            return False
        first = np.flatnonzero(begins)
        rows = np.stack([sample + self._count, kind, files.offsets[start:], files.sizes[start:]], axis=1)
        self._keep(stems[first], rows)
        self._count += len(first)
        self._sample = bytes(self._names[-1][-1])
        self._suffixes = {_SUFFIXES[i] for i in kind[first[-1] :].tolist()}
        self.last_is_in_sample = True
        return True

    def _keep(self, names: npt.NDArray[np.bytes_], rows: npt.NDArray[np.int64]) -> None:
        if len(names):
            self._names.append(names)
        if len(rows):
            self._rows.append(rows)
