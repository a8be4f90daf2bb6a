"""Group the files of a tar into samples: consecutive files with the same name up to the first dot.

Shards of millions of samples are grouped once. Nearly all of their files have names such as `000012.jpg`, `000012.txt`
and `000012.json`; those are grouped in numpy, a batch at a time, and any others one by one, by the same rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from clip_rd_edge.data.shards.tar_scan import TarFiles

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
