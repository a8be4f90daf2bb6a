"""Random access to WebDataset shards: a tar is indexed once, and then every sample can be read by its offset.

A sample consists of consecutive files with the same name up to the first dot, as in webdataset and open_clip:
`000012.jpg`, `000012.txt`, `000012.json`. The index stores the locations of its image, text, JSON and class.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import threading
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from clip_rd_edge.data.remote import RemoteShard, ShardFile, Version, open_file, shard_identity, versions
from clip_rd_edge.data.tar import COLUMNS, REINFORCED_COLUMNS, Kind, SampleGroups, TarScan, member_name, read_at
from clip_rd_edge.errors import InputError, UnreachableError
from clip_rd_edge.utils.arrays import HEADERS, npz_bytes
from clip_rd_edge.utils.files import machine_failure, write_bytes
from clip_rd_edge.utils.paths import cache_home

_ALL_COLUMNS = COLUMNS | REINFORCED_COLUMNS
_SUFFIXES: dict[Kind, str] = {"image": "", "text": ".txt", "json": ".json", "class": ".cls"}
_MAX_OPEN = 64
_INDEX_FORMAT = "4"  # increase when the same tar is indexed differently
_CACHE_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # raised by a damaged cached index


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in an uncompressed tar; implements `bundle.images.ImageFile`.

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
            raise UnreachableError(str(error), hint=error.advice) from error
        except OSError as error:
            lost = UnreachableError(f"Cannot read the shard {shard}: {error.strerror or error}.")
            raise machine_failure(error) or lost from error
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
        locations: offset and size in bytes of image, text, JSON and class, (G, 4, 2), and in a shard of reinforced
            samples of their further files, (G, 8, 2); an offset of -1 means missing.
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
        return self.locations_of(kind)[:, 0] >= 0

    def locations_of(self, kind: Kind) -> npt.NDArray[np.int64]:
        """Return offset and size in bytes of each sample's file of this kind, (G, 2)."""
        column = _ALL_COLUMNS[kind]
        if column >= self.locations.shape[1]:
            return np.full((len(self), 2), (-1, 0), np.int64)
        locations: npt.NDArray[np.int64] = self.locations[:, column]
        return locations

    def member(self, index: int, kind: Kind) -> TarMember | None:
        """Return a sample's image, text, JSON or class file, or None if it has none."""
        offset, size = self.locations_of(kind)[index].tolist()
        if offset < 0:
            return None
        return TarMember(self.path, self.name(index) + _SUFFIXES[kind], offset, size)


def close_tars() -> None:
    """Close all tars, so that one that was replaced since is opened again."""
    _open_tar.clear()


def current_versions(shards: Sequence[ShardFile]) -> list[Version]:
    """Return the versions that shards have now, which they are read as from here on; raises as `remote.versions`."""
    close_tars()
    return versions(shards)


def open_shard(path: ShardFile) -> Shard:
    """Return a shard's index, from the cache if path, size and modification time of the tar are unchanged."""
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
    damage, lost = np.asarray(shard.damage), np.asarray(shard.lost)
    with contextlib.suppress(OSError):  # a full or read-only cache only costs time
        write_bytes(cached, npz_bytes(names=shard.names, places=shard.locations, damage=damage, lost=lost))
    return shard


def _index_tar(path: ShardFile) -> Shard:
    groups = SampleGroups()
    scan = TarScan(partial(open_file, path))
    try:
        groups.add_all(scan)
    except OSError as error:
        raise InputError(f"Cannot read the shard {path}: {error.strerror or error}.") from error
    if scan.damage and not len(groups):
        raise InputError(
            f"{path} is not an uncompressed tar: {scan.damage}.",
            hint="decompress .tar.gz files: shards need random access",
        )
    count = len(groups) - (scan.last_is_incomplete and groups.last_is_in_sample)
    locations = groups.locations()[:count]
    lost = _samples_in(scan.size_bytes, locations) if scan.damage else 0
    return Shard(path, groups.names(count), locations, scan.damage, lost)


def _samples_in(size_bytes: int, locations: npt.NDArray[np.int64]) -> int:
    """Return how many samples fit behind the known ones, (G, K, 2), in a tar of this size."""
    end = int(locations.sum(axis=2).max(initial=0))
    return round((size_bytes - end) * len(locations) / end) if 0 < end < size_bytes else 0
