"""Random access to WebDataset shards: a tar is indexed once, and then every sample can be read by its offset.

A sample consists of consecutive files with the same name up to the first dot, as in webdataset and open_clip:
`000012.jpg`, `000012.txt`, `000012.json`. The index stores the locations of its image, text, JSON and class.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import threading
import weakref
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from clip_rd_edge.data.remote import RemoteShard, ShardFile, shard_identity
from clip_rd_edge.data.shard_cache import open_file
from clip_rd_edge.data.tar_scan import TarScan, member_name, read_at
from clip_rd_edge.errors import InputError, UnreachableError
from clip_rd_edge.utils.arrays import HEADERS
from clip_rd_edge.utils.io import cache_home, write_bytes

Kind = Literal["image", "text", "json", "class"]
_COLUMN_OF_SUFFIX = {b"jpg": 0, b"jpeg": 0, b"png": 0, b"webp": 0, b"txt": 1, b"json": 2, b"cls": 3}
_COLUMNS: dict[Kind, int] = {"image": 0, "text": 1, "json": 2, "class": 3}
_SUFFIXES: dict[Kind, str] = {"image": "", "text": ".txt", "json": ".json", "class": ".cls"}
_META = re.compile(rb"(?:.*/)?__[^/]*__(?:/|$|\.)")  # webdataset's metadata
_MAX_OPEN = 64
_INDEX_FORMAT = "3"  # increase when the same tar is indexed differently
_CACHE_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # raised by a damaged cached index


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in an uncompressed tar; implements `contract.images.ImageFile`.

    Without a name, the tar is asked for it when a message needs it.
    """

    shard: ShardFile
    name: str
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """Return the file's content."""
        tar = _open_tar(self.shard)
        content = read_at(tar.file, self.size, self.offset)
        if len(content) < self.size:
            raise OSError(f"expected {self.size:,} bytes, found {len(content):,}")
        return content

    def __str__(self) -> str:
        if self.name:
            return f"{self.shard}: {self.name}"
        tar = _open_tar(self.shard)
        return f"{self.shard}: {member_name(tar.file, self.offset)}"


class _OpenTar:
    """A file that is closed once nobody holds it: after the last read of one that is no longer kept open."""

    def __init__(self, shard: ShardFile) -> None:
        try:
            self.file = open_file(shard)
        except InputError as error:  # not a bad sample: other pairs must not take the places of a whole shard's
            raise UnreachableError(str(error), hint=error.hint) from error
        except OSError as error:
            if isinstance(shard, Path):
                raise
            raise UnreachableError(
                f"The shard {shard} could not be kept in the cache: {error.strerror or error}.",
                hint="free some space, or name another folder with CLIP_RD_EDGE_CACHE",
            ) from error
        weakref.finalize(self, os.close, self.file)


class _OpenTars:
    """The tars used most recently. Reads name their offset, so that forked workers and threads can share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tars = OrderedDict[ShardFile, _OpenTar]()

    def __call__(self, shard: ShardFile) -> _OpenTar:
        with self._lock:
            if shard in self._tars:
                self._tars.move_to_end(shard)
                return self._tars[shard]
        tar = _OpenTar(shard)  # may fetch it
        with self._lock:
            self._tars[shard] = tar
            # A file that was removed from the cache of remote shards takes room on the disk until it is closed.
            for other in [o for o in self._tars if isinstance(o, RemoteShard) and o != shard]:
                if os.fstat(self._tars[other].file).st_nlink == 0:
                    del self._tars[other]
            while len(self._tars) > _MAX_OPEN:
                self._tars.popitem(last=False)
        return tar

    def clear(self) -> None:
        with self._lock:
            self._tars.clear()


_open_tar = _OpenTars()


@dataclass(frozen=True)
class Shard:
    """The index of a tar with G samples.

    Attributes:
        names: sample names up to the first dot, (G,), UTF-8.
        locations: offset and size in bytes of image, text, JSON and class, (G, 4, 2); an offset of -1 means missing.
        damage: where the tar is damaged and indexing stopped, or empty.
        lost: about how many samples lie behind the damage, by the size of those before it.
    """

    path: ShardFile
    names: npt.NDArray[np.bytes_]
    locations: npt.NDArray[np.int64]
    damage: str
    lost: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the name of a sample."""
        return bytes(self.names[index]).decode(errors="replace")

    def has(self, kind: Kind) -> npt.NDArray[np.bool_]:
        """Return a mask of the samples that have this kind of file, (G,)."""
        mask: npt.NDArray[np.bool_] = self.locations[:, _COLUMNS[kind], 0] >= 0
        return mask

    def locations_of(self, kind: Kind) -> npt.NDArray[np.int64]:
        """Return offset and size in bytes of each sample's file of this kind, (G, 2)."""
        locations: npt.NDArray[np.int64] = self.locations[:, _COLUMNS[kind]]
        return locations

    def member(self, index: int, kind: Kind) -> TarMember | None:
        """Return a sample's image, text, JSON or class file, or None if it has none."""
        offset, size = self.locations[index, _COLUMNS[kind]].tolist()
        if offset < 0:
            return None
        return TarMember(self.path, self.name(index) + _SUFFIXES[kind], offset, size)


def close_tars() -> None:
    """Close all tars, so that one that was replaced since is opened again."""
    _open_tar.clear()


def open_shard(path: ShardFile) -> Shard:
    """Return a shard's index, from the cache if path, size and modification time of the tar are unchanged.

    Raises:
        InputError: the file does not exist or is not an uncompressed tar.
    """
    identity = f"{_INDEX_FORMAT}\n{shard_identity(path)}"
    cached = (
        cache_home() / "shards" / f"{hashlib.sha256(identity.encode(errors='surrogateescape')).hexdigest()[:32]}.npz"
    )
    # A damaged cached index is built again.
    with (
        contextlib.suppress(*_CACHE_ERRORS),
        HEADERS,
        np.load(io.BytesIO(cached.read_bytes()), allow_pickle=False) as index,
    ):
        return Shard(path, index["names"], index["places"], str(index["damage"]), int(index["lost"]))
    close_tars()
    shard = _index_tar(path)
    buffer = io.BytesIO()
    np.savez(buffer, names=shard.names, places=shard.locations, damage=np.asarray(shard.damage), lost=shard.lost)
    with contextlib.suppress(OSError):  # a full or read-only cache only costs time
        write_bytes(cached, buffer.getvalue())
    return shard


def _index_tar(path: ShardFile) -> Shard:
    names: list[bytes] = []
    rows: list[int] = []  # sample, column, offset and size of each file that counts, one after another
    scan = TarScan(partial(open_file, path))
    last_sample, suffixes, is_in_sample = b"", set[bytes](), False
    try:
        for name, offset, size in scan:
            base = name.rfind(b"/") + 1
            dot = name.find(b".", base)
            # Hidden files, files without a suffix and webdataset's metadata are not part of a sample.
            is_in_sample = base < dot < len(name) - 1 and not (b"__" in name and _META.match(name))
            if not is_in_sample:
                continue
            sample, suffix = name[:dot], name[dot + 1 :].lower()
            # A repeated suffix starts a new sample: names are unique only within a tar, and tars get concatenated.
            if sample != last_sample or suffix in suffixes:
                names.append(sample)
                last_sample, suffixes = sample, {suffix}
            else:
                suffixes.add(suffix)
            if suffix in _COLUMN_OF_SUFFIX:
                rows += (len(names) - 1, _COLUMN_OF_SUFFIX[suffix], offset, size)
    except OSError as error:
        raise InputError(f"Cannot read the shard {path}: {error.strerror or error}.") from error
    if scan.damage and not names:
        raise InputError(
            f"{path} is not an uncompressed tar: {scan.damage}.",
            hint="decompress .tar.gz files: shards need random access",
        )
    locations = np.full((len(names), len(_COLUMNS), 2), (-1, 0), np.int64)
    if rows:  # in reverse, so that the first of several images stays
        sample_of, column_of, offsets, sizes = np.asarray(rows, np.int64).reshape(-1, 4)[::-1].T
        locations[sample_of, column_of] = np.stack([offsets, sizes], axis=1)
    count = len(names) - (scan.last_is_incomplete and is_in_sample)
    lost = _samples_in(scan.size_bytes, locations[:count]) if scan.damage else 0
    return Shard(path, np.asarray(names[:count], np.bytes_), locations[:count], scan.damage, lost)


def _samples_in(size_bytes: int, locations: npt.NDArray[np.int64]) -> int:
    """Return how many samples fit behind the known ones, (G, K, 2), in a tar of this size."""
    end = int(locations.sum(axis=2).max(initial=0))
    return round((size_bytes - end) * len(locations) / end) if 0 < end < size_bytes else 0
