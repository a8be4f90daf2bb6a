"""Where the samples of WebDataset shards lie: each tar is scanned once, and then every sample can be read at any time.

A sample consists of consecutive files with the same name up to the first dot, as in webdataset and open_clip:
`000012.jpg`, `000012.txt`, `000012.json`. The samples of each shard are kept, and those of all shards of a data set:

    index.json   the shards: number of samples, and a digest of their names and locations
    rows.bin     52 bytes per sample with an image and a caption: where its files lie in its shard, and the CRC-32 of
                 that; 100 bytes per reinforced sample, which has twice as many

The folder is named after the paths, sizes and modification times of the shards. Nothing is kept in memory, so loader
processes share the pages of the file, and 15 million samples cost as much as 15.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.data.remote import ShardFile, in_threads, shard_identity
from clip_rd_edge.data.samples import INDEX, NO_PROBLEMS, Problems, Stored, kept_index
from clip_rd_edge.data.shard_files import TarMember, ask_versions, close_tars, open_file
from clip_rd_edge.data.tar import KINDS, PLAIN_KINDS, Kind, TarScan, samples_of
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.arrays import HEADERS, npz_bytes
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.paths import cache_home
from clip_rd_edge.utils.structs import read_json, to_json
from clip_rd_edge.utils.text import SILENT, Reporter

INDEXING_STAGE = "indexing shards"
_FORMAT = "6"  # increase when the same tar, or the same shards, are indexed differently
_ROWS = "rows.bin"
_FETCHING_THREADS = 8
_SUFFIXES: dict[Kind, str] = {"text": ".txt", "json": ".json", "class": ".cls"}
_CACHE_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # raised by a damaged cached index
_HINT = "each sample needs an image and a caption, as .txt or in a .json: see {json_caption_key}"


@dataclass(frozen=True)
class Shard:
    """The samples of a tar, G of them.

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

    def has(self, *kinds: Kind) -> npt.NDArray[np.bool_]:
        """Return a mask of the samples that have one of these kinds of files, (G,)."""
        columns = [column for column in map(KINDS.index, kinds) if column < self.locations.shape[1]]
        mask: npt.NDArray[np.bool_] = np.logical_or.reduce(self.locations[:, columns, 0] >= 0, axis=1)
        return mask

    def files(self, index: int) -> dict[Kind, TarMember]:
        """Return the files that a sample has."""
        places = zip(KINDS, self.locations[index].tolist(), strict=False)
        return {
            kind: TarMember(self.path, self.name(index) + _SUFFIXES.get(kind, ""), *place)
            for kind, place in places
            if place[0] >= 0
        }


def open_shard(path: ShardFile) -> Shard:
    """Return a shard's samples, from the cache if path, size and modification time of the tar are unchanged."""
    identity = f"{_FORMAT}\n{shard_identity(path)}"
    key = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]
    cached = cache_home() / "shards" / f"{key}.npz"
    # A damaged cached index is built again.
    with (
        contextlib.suppress(*_CACHE_ERRORS),
        HEADERS,
        np.load(io.BytesIO(cached.read_bytes()), allow_pickle=False) as index,
    ):
        return Shard(path, index["names"], index["places"], str(index["damage"]), int(index["lost"]))
    close_tars()
    shard = _scan(path)
    damage, lost = np.asarray(shard.damage), np.asarray(shard.lost)
    with contextlib.suppress(OSError):  # a full or read-only cache only costs time
        write_bytes(cached, npz_bytes(names=shard.names, places=shard.locations, damage=damage, lost=lost))
    return shard


def _scan(path: ShardFile) -> Shard:
    scan = TarScan(partial(open_file, path))
    names, locations = samples_of(scan)
    if scan.damage and not len(names):
        raise InputError(
            f"{path} is not an uncompressed tar: {scan.damage}.",
            hint="decompress .tar.gz files: shards need random access",
        )
    return Shard(path, names, locations, scan.damage, _samples_in(scan.size_bytes, locations) if scan.damage else 0)


def _samples_in(size_bytes: int, locations: npt.NDArray[np.int64]) -> int:
    """Return how many samples fit behind the known ones, (G, K, 2), in a tar of this size."""
    end = int(locations.sum(axis=2).max(initial=0))
    return round((size_bytes - end) * len(locations) / end) if 0 < end < size_bytes else 0


def _row_type(reinforced: bool) -> np.dtype[np.void]:
    kinds = len(KINDS) if reinforced else PLAIN_KINDS
    return np.dtype([("offset", "<i8", kinds), ("size", "<u4", kinds), ("crc32", "<u4")])


class _IndexedShard(msgspec.Struct, frozen=True):
    """A shard's number of pairs, the digest of its samples, and if it is damaged, about how many samples are lost."""

    samples: int
    sha256: str
    lost: int | None


class _Index(msgspec.Struct, frozen=True):
    shards: list[_IndexedShard]
    problems: Problems


class ShardIndex:
    """Locations of the samples of a list of shards that have an image and a caption.

    Attributes:
        samples: number of such samples per shard, (S,).
        problems: all other samples, and damaged shards. How many samples these have lost is estimated from the size of
            what cannot be read, or from the number in undamaged shards, whichever is more.
    """

    def __init__(self, folder: Path, *, reinforced: bool = False) -> None:
        index = read_json(folder / INDEX, _Index)
        self.problems, self._digests = index.problems, [shard.sha256 for shard in index.shards]
        self._row, self._rows = _row_type(reinforced), Stored(folder / _ROWS)
        self.samples = np.asarray([shard.samples for shard in index.shards], np.int64)
        self._first = np.cumsum(self.samples) - self.samples
        if len(self._rows.view) != self.samples.sum() * self._row.itemsize:
            raise self._rows.damage(int(self.samples.sum()))

    def locate(self, shard: int, sample: int) -> dict[Kind, tuple[int, int]]:
        """Return the offset and the size in bytes of each file of the `sample`-th pair of a shard."""
        size, number = self._row.itemsize, int(self._first[shard]) + sample
        raw = self._rows.view[number * size : (number + 1) * size]
        row = np.frombuffer(raw, self._row)[0]
        if zlib.crc32(raw[:-4]) != row["crc32"]:
            raise self._rows.damage(number)
        places = zip(KINDS, row["offset"].tolist(), row["size"].tolist(), strict=False)
        return {kind: (offset, size) for kind, offset, size in places if offset >= 0}

    def identity(self) -> Iterator[bytes]:
        """Yield one digest per shard of its samples' names and locations."""
        yield from (digest.encode() for digest in self._digests)


def index_shards(
    paths: Sequence[ShardFile],
    *,
    json_key: str | None,
    captioned: bool = True,
    reinforced: bool = False,
    reporter: Reporter = SILENT,
) -> ShardIndex:
    """Return the index of some shards, from the cache if path, size and modification time of all are unchanged.

    Each shard's result is cached: an interrupted call is resumed. Remote ones are fetched by several threads.

    Args:
        json_key, captioned: as for `data.webdataset.Shards`.
        reinforced: whether a sample also needs augmentations and embeddings; see `distillation.reinforced`.
    """
    ask_versions(paths)
    index = partial(_index_shard, json_key=json_key, captioned=captioned, reinforced=reinforced)

    def build(folder: Path) -> None:
        shards, problems = list[_IndexedShard](), NO_PROBLEMS
        is_remote = any(not isinstance(path, Path) for path in paths)
        parts = in_threads(index, paths, threads=_FETCHING_THREADS) if is_remote else map(index, paths)
        with (folder / _ROWS).open("wb") as file:
            for shard, rows, of_shard in parts:
                reporter.update(INDEXING_STAGE, len(shards), len(paths))
                shards.append(shard)
                file.write(rows.data)
                problems += of_shard
        problems = msgspec.structs.replace(problems, lost=_lost(shards))
        (folder / INDEX).write_bytes(to_json(_Index(shards, problems)))
        reporter.update(INDEXING_STAGE, len(paths), len(paths))

    key = f"{json_key!r}{' reinforced' * reinforced}" if captioned else "images"
    identity = [_FORMAT, key, *map(shard_identity, paths)]
    return ShardIndex(kept_index("shard-indices", identity, build), reinforced=reinforced)


def _lost(shards: Sequence[_IndexedShard]) -> int:
    whole = [shard.samples for shard in shards if shard.lost is None]
    usual = int(np.median(whole)) if whole else 0
    # A shard's message counts as one sample already.
    return sum(max(shard.lost, usual - shard.samples - 1, 0) for shard in shards if shard.lost is not None)


def _index_shard(
    path: ShardFile, *, json_key: str | None, captioned: bool, reinforced: bool
) -> tuple[_IndexedShard, npt.NDArray[np.void], Problems]:
    """Return a shard's entry, the rows of its pairs, and its damage and its other samples."""
    shard = open_shard(path)
    needs = {"image (.jpg, .png, .webp)": shard.has("image")}
    if captioned:
        kinds: tuple[Kind, ...] = ("text", "json") if json_key is None else ("json",)
        needs["caption (.txt, .json)"] = shard.has(*kinds)
    if reinforced:
        needs["augmentations (.paug.json)"] = shard.has("augmentations")
        needs["embeddings (.npz, .pth.gz)"] = shard.has("arrays", "tensors")
    is_whole = np.logical_and.reduce(list(needs.values()))
    messages = [f"{shard.path}: {shard.damage}"] if shard.damage else []
    for index in np.flatnonzero(~is_whole).tolist():
        missing = next(name for name, has in needs.items() if not has[index])
        messages.append(f"{shard.path}: {shard.name(index)} has no {missing}")
    pairs = np.zeros(int(is_whole.sum()), _row_type(reinforced))
    kept = min(pairs["offset"].shape[1], shard.locations.shape[1])  # a reinforced sample has all kinds
    places = shard.locations[is_whole, :kept]
    pairs["offset"][:, :kept] = places[..., 0]
    pairs["size"][:, :kept] = np.minimum(places[..., 1], np.iinfo(np.uint32).max)  # no file of 4 GiB is read
    pairs["crc32"] = [zlib.crc32(row.tobytes()[:-4]) for row in pairs]
    digest = hashlib.sha256(path.name.encode(errors="surrogateescape"))
    digest.update(np.ascontiguousarray(shard.names).data)
    digest.update(np.ascontiguousarray(shard.locations).data)
    entry = _IndexedShard(len(pairs), digest.hexdigest(), shard.lost if shard.damage else None)
    return entry, pairs, Problems.of(messages, hint=_HINT)
