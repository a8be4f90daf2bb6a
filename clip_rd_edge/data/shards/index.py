"""The index of all shards of a data set in one file, from which a sample's location is read when it is needed.

    index.json   the shards: number of samples, and a digest of their names and locations
    rows.bin     29 bytes per sample that is a pair: where its image and its caption lie in its shard, and the CRC-32 of
                 that; 66 bytes per reinforced sample, where its other files lie, too
    left-out     one message per sample that is not a pair, as JSON lines

The folder is named after the paths, sizes and modification times of the shards. Nothing is kept in memory, so loader
processes share the pages of the file, and 15 million samples cost as much as 15.
"""

from __future__ import annotations

import hashlib
import os
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.data.index_files import INDEX, Messages, damage, kept_index, ordered_map
from clip_rd_edge.data.remote import ShardFile, shard_identity
from clip_rd_edge.data.shards.tars import current_versions, open_shard
from clip_rd_edge.data.tar import read_at
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import read_json, to_json

INDEXING_STAGE = "indexing shards"
_FORMAT = "4"  # increase when the same shards are indexed differently
_ROWS, _LEFT_OUT = "rows.bin", "left-out"
_PLACES = (("image", "<i8"), ("caption", "<i8"), ("image_size", "<u4"), ("caption_size", "<u4"), ("kind", "u1"))
_CRC32 = ("crc32", "<u4")
_ROW = np.dtype([*_PLACES, _CRC32])
_REINFORCED_ROW = np.dtype(
    [
        *_PLACES,
        *((name, "<i8") for name in ("synthetic", "augmentations", "embeddings")),
        *((name, "<u4") for name in ("synthetic_size", "augmentations_size", "embeddings_size")),
        ("is_torch", "u1"),
        _CRC32,
    ]
)
_KINDS: tuple[Literal["text", "json"], ...] = ("text", "json")
_SERIAL_BYTES = 1 << 28  # of tars; starting processes takes longer than scanning less than that


class SampleLocation(NamedTuple):
    """Where the image and the caption of a sample lie in its shard: offsets and sizes in bytes."""

    image: int
    image_size: int
    caption: int
    caption_size: int
    kind: Literal["text", "json"]


class ReinforcementLocation(NamedTuple):
    """Where the further files of a reinforced sample lie in its shard: offset and size in bytes of each.

    Attributes:
        synthetic: None if the sample has no synthetic captions.
        is_torch: whether the embeddings are a .pth.gz, not a .npz.
    """

    synthetic: tuple[int, int] | None
    augmentations: tuple[int, int]
    embeddings: tuple[int, int]
    is_torch: bool


class _IndexedShard(msgspec.Struct, frozen=True):
    """A shard's number of pairs, the digest of its samples, and if it is damaged, about how many samples are lost."""

    samples: int
    sha256: str
    lost: int | None


class _Index(msgspec.Struct, frozen=True):
    shards: list[_IndexedShard]
    left_out: int


class ShardIndex:
    """Locations of the samples of a list of shards that have an image and a caption.

    Attributes:
        samples: number of such samples per shard, (S,).
        left_out: messages about all other samples, and about damaged shards.
        lost: about how many samples the damaged shards have lost, beside those of the messages: by the size of what
            cannot be read, or by what the shards that are not damaged have, whichever is more.
    """

    def __init__(self, folder: Path, *, reinforced: bool = False) -> None:
        self._index = read_json(folder / INDEX, _Index)
        self._row = _REINFORCED_ROW if reinforced else _ROW
        self._path = folder / _ROWS
        self._file: int | None = None
        self.samples = np.asarray([shard.samples for shard in self._index.shards], np.int64)
        self._first = np.cumsum(self.samples) - self.samples
        self.lost = _lost(self._index.shards)
        self.left_out: Sequence[str] = (
            Messages(folder / _LEFT_OUT, self._index.left_out) if self._index.left_out else ()
        )
        if self._path.stat().st_size != self.samples.sum() * self._row.itemsize:
            raise InputError(f"{self._path} has another size than its index says.", hint="delete it; it is made again")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}  # a process that receives a copy opens the file itself

    def locate(self, shard: int, sample: int) -> SampleLocation:
        """Return the location of the `sample`-th pair of a shard."""
        image, caption, image_size, caption_size, kind = self._read(shard, sample)[:5]
        return SampleLocation(image, image_size, caption, caption_size, _KINDS[kind])

    def locate_reinforcement(self, shard: int, sample: int) -> ReinforcementLocation:
        """Return the location of the further files of the `sample`-th pair of a shard of reinforced samples."""
        synthetic, augmentations, embeddings, *sizes, is_torch, _ = self._read(shard, sample)[5:]
        return ReinforcementLocation(
            None if synthetic < 0 else (synthetic, sizes[0]),
            (augmentations, sizes[1]),
            (embeddings, sizes[2]),
            bool(is_torch),
        )

    def _read(self, shard: int, sample: int) -> tuple[int, ...]:
        if self._file is None:
            self._file = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            weakref.finalize(self, os.close, self._file)
        size, number = self._row.itemsize, int(self._first[shard]) + sample
        raw = read_at(self._file, size, number * size)
        row: tuple[int, ...] = np.frombuffer(raw, self._row)[0].tolist()
        if zlib.crc32(raw[:-4]) != row[-1]:
            raise damage(self._path.parent, number)
        return row

    def identity(self) -> Iterator[bytes]:
        """Yield one digest per shard of its samples' names and locations."""
        yield from (shard.sha256.encode() for shard in self._index.shards)


def index_shards(
    paths: Sequence[ShardFile],
    *,
    json_key: str | None,
    captioned: bool = True,
    reinforced: bool = False,
    reporter: Reporter = SILENT,
) -> ShardIndex:
    """Return the index of some shards, from the cache if path, size and modification time of all are unchanged.

    Shards are scanned by several processes, and each one's result is cached: an interrupted call goes on where it was.

    Args:
        json_key, captioned: as for `data.webdataset.ShardPairs`.
        reinforced: whether a sample also needs augmentations and embeddings; see `data.reinforced`.
        reporter: receives the number of indexed shards.
    """
    sizes = [size for size, _ in current_versions(paths)]
    identities = [shard_identity(path) for path in paths]
    # Fetching takes longer than starting processes, whatever the sizes.
    is_large = any(not isinstance(path, Path) for path in paths) or sum(sizes) >= _SERIAL_BYTES
    index = partial(_index_shard, json_key=json_key, captioned=captioned, reinforced=reinforced)
    build = partial(_build, paths=paths, parallel=is_large, index=index, reporter=reporter)
    key = f"{json_key!r}{' reinforced' * reinforced}" if captioned else "images"
    return ShardIndex(kept_index("shard-indices", [_FORMAT, key, *identities], build), reinforced=reinforced)


def _build(
    folder: Path,
    *,
    paths: Sequence[ShardFile],
    parallel: bool,
    index: Callable[[ShardFile], _IndexedPart],
    reporter: Reporter,
) -> None:
    shards: list[_IndexedShard] = []
    left_out = 0
    with (
        (folder / _ROWS).open("wb") as rows_file,
        (folder / _LEFT_OUT).open("wb") as messages_file,
        ordered_map(parallel=parallel and len(paths) > 1) as shard_map,
    ):
        for shard, rows, messages in shard_map(index, paths):
            reporter.update(INDEXING_STAGE, len(shards), len(paths))
            shards.append(shard)
            rows_file.write(rows.data)
            messages_file.write(Messages.encode(messages))
            left_out += len(messages)
    (folder / INDEX).write_bytes(to_json(_Index(shards, left_out)))
    reporter.update(INDEXING_STAGE, len(paths), len(paths))


def _lost(shards: Sequence[_IndexedShard]) -> int:
    whole = [shard.samples for shard in shards if shard.lost is None]
    usual = int(np.median(whole)) if whole else 0
    # A shard's message counts as one sample already.
    return sum(max(shard.lost, usual - shard.samples - 1, 0) for shard in shards if shard.lost is not None)


# A shard's entry, the rows of its pairs, and messages about its damage and its other samples.
_IndexedPart = tuple[_IndexedShard, npt.NDArray[np.void], list[str]]


def _index_shard(path: ShardFile, *, json_key: str | None, captioned: bool, reinforced: bool) -> _IndexedPart:
    shard = open_shard(path)
    has_image, has_text, has_json = shard.has("image"), shard.has("text"), shard.has("json")
    has_caption = has_json if json_key is not None else has_text | has_json
    if not captioned:
        has_caption = np.ones_like(has_image)
    needs = {"image (.jpg, .png, .webp)": has_image, "caption (.txt, .json)": has_caption}
    if reinforced:
        needs["augmentations (.paug.json)"] = shard.has("augmentations")
        needs["embeddings (.npz, .pth.gz)"] = shard.has("arrays") | shard.has("tensors")
    is_whole = np.logical_and.reduce(list(needs.values()))
    messages = [f"{shard.path}: {shard.damage}"] if shard.damage else []
    for index in np.flatnonzero(~is_whole).tolist():
        missing = next(name for name, has in needs.items() if not has[index])
        messages.append(f"{shard.path}: {shard.name(index)} has no {missing}")
    is_json = ~has_text | (json_key is not None)
    caption = np.where(is_json[:, None], shard.locations_of("json"), shard.locations_of("text"))
    rows = np.empty(len(shard), _REINFORCED_ROW if reinforced else _ROW)
    rows["image"], rows["image_size"] = _columns(shard.locations_of("image"))
    rows["caption"], rows["caption_size"] = _columns(caption)
    rows["kind"] = is_json
    if reinforced:
        is_torch = ~shard.has("arrays")  # with both, the arrays, which are more precise
        embeddings = np.where(is_torch[:, None], shard.locations_of("tensors"), shard.locations_of("arrays"))
        rows["synthetic"], rows["synthetic_size"] = _columns(shard.locations_of("synthetic"))
        rows["augmentations"], rows["augmentations_size"] = _columns(shard.locations_of("augmentations"))
        rows["embeddings"], rows["embeddings_size"] = _columns(embeddings)
        rows["is_torch"] = is_torch
    digest = hashlib.sha256(path.name.encode(errors="surrogateescape"))
    digest.update(np.ascontiguousarray(shard.names).data)
    digest.update(np.ascontiguousarray(shard.locations).data)
    pairs = rows[is_whole]
    pairs["crc32"] = [zlib.crc32(row.tobytes()[:-4]) for row in pairs]
    return _IndexedShard(len(pairs), digest.hexdigest(), shard.lost if shard.damage else None), pairs, messages


def _columns(locations: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    # No image or caption of 4 GiB is read; see the limits where they are.
    return locations[:, 0], np.minimum(locations[:, 1], np.iinfo(np.uint32).max)
