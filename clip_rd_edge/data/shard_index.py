"""The index of all shards of a data set in one file, from which a sample's location is read when it is needed.

    index.json   the shards: number of samples, and a digest of their names and locations
    rows.bin     25 bytes per sample that is a pair: where its image and its caption lie in its shard
    left-out     one message per sample that is not a pair, as JSON lines

The folder is named after the paths, sizes and modification times of the shards. Nothing is kept in memory, so loader
processes share the pages of the file, and 15 million samples cost as much as 15.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.data.remote import ShardFile, shard_identity, versions
from clip_rd_edge.data.tar_scan import read_at
from clip_rd_edge.data.tars import close_tars, open_shard
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.io import cache_home, new_folder, read_json, to_json
from clip_rd_edge.utils.reporting import SILENT, Reporter

INDEXING_STAGE = "indexing shards"
_FORMAT = "1"  # increase when the same shards are indexed differently
_INDEX, _ROWS, _LEFT_OUT = "index.json", "rows.bin", "left-out"
_ROW = np.dtype([("image", "<i8"), ("caption", "<i8"), ("image_size", "<u4"), ("caption_size", "<u4"), ("kind", "u1")])
_KINDS: tuple[Literal["text", "json"], ...] = ("text", "json")
_MAX_WORKERS = 8
_SERIAL_BYTES = 1 << 28  # of tars; starting processes takes longer than scanning less than that


class SampleLocation(NamedTuple):
    """Where the image and the caption of a sample lie in its shard: offsets and sizes in bytes."""

    image: int
    image_size: int
    caption: int
    caption_size: int
    kind: Literal["text", "json"]


class _IndexedShard(msgspec.Struct, frozen=True):
    samples: int
    sha256: str


class _Index(msgspec.Struct, frozen=True):
    shards: list[_IndexedShard]
    left_out: int


class Messages(Sequence[str]):
    """Messages in a file, one JSON string per line, of which any number costs no memory."""

    def __init__(self, path: Path, count: int) -> None:
        self._path, self._count = path, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return list(self)[index]

    def __iter__(self) -> Iterator[str]:
        with self._path.open("rb") as file:
            for line in file:
                yield msgspec.json.decode(line, type=str)


class ShardIndex:
    """Locations of the samples of a list of shards that have an image and a caption.

    Attributes:
        samples: number of such samples per shard, (S,).
        left_out: messages about all other samples, and about damaged shards.
    """

    def __init__(self, folder: Path) -> None:
        self._index = read_json(folder / _INDEX, _Index)
        self._path = folder / _ROWS
        self._file: int | None = None
        self.samples = np.asarray([shard.samples for shard in self._index.shards], np.int64)
        self._first = np.cumsum(self.samples) - self.samples
        self.left_out: Sequence[str] = (
            Messages(folder / _LEFT_OUT, self._index.left_out) if self._index.left_out else ()
        )
        if self._path.stat().st_size != self.samples.sum() * _ROW.itemsize:
            raise InputError(f"{self._path} has another size than its index says.", hint="delete it; it is made again")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}  # a process that receives a copy opens the file itself

    def locate(self, shard: int, sample: int) -> SampleLocation:
        """Return the location of the `sample`-th pair of a shard."""
        if self._file is None:
            self._file = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        raw = read_at(self._file, _ROW.itemsize, (int(self._first[shard]) + sample) * _ROW.itemsize)
        image, caption, image_size, caption_size, kind = np.frombuffer(raw, _ROW)[0].tolist()
        return SampleLocation(image, image_size, caption, caption_size, _KINDS[kind])

    def identity(self) -> Iterator[bytes]:
        """Yield one digest per shard of its samples' names and locations."""
        yield from (shard.sha256.encode() for shard in self._index.shards)


def index_shards(paths: Sequence[ShardFile], *, json_key: str | None, reporter: Reporter = SILENT) -> ShardIndex:
    """Return the index of some shards, from the cache if path, size and modification time of all are unchanged.

    Shards are scanned by several processes, and each one's result is cached: an interrupted call goes on where it was.

    Args:
        json_key: as for `data.webdataset.ShardPairs`.
        reporter: receives the number of indexed shards.

    Raises:
        InputError: a shard cannot be read or is not an uncompressed tar.
    """
    close_tars()
    sizes = [size for size, _ in versions(paths)]
    parts = [shard_identity(path) for path in paths]
    key = hashlib.sha256("\n".join([_FORMAT, repr(json_key), *parts]).encode(errors="surrogateescape")).hexdigest()[:32]
    folder = cache_home() / "shard-indices" / key
    if not (folder / _INDEX).is_file():
        # Fetching takes longer than starting processes, whatever the sizes.
        total = sum(sizes) if all(isinstance(path, Path) for path in paths) else _SERIAL_BYTES
        try:
            _build(folder, paths, total, json_key, reporter)
        except OSError:  # the cache is full or read-only: keep the index for this run alone
            temporary = Path(tempfile.mkdtemp(prefix="clip-rd-edge-"))
            atexit.register(shutil.rmtree, temporary, ignore_errors=True)
            folder = temporary / key
            _build(folder, paths, total, json_key, reporter)
    return ShardIndex(folder)


def _build(
    folder: Path, paths: Sequence[ShardFile], total_bytes: int, json_key: str | None, reporter: Reporter
) -> None:
    shards: list[_IndexedShard] = []
    left_out = 0
    with (
        new_folder(folder) as new,
        (new / _ROWS).open("wb") as rows_file,
        (new / _LEFT_OUT).open("wb") as messages_file,
        _parallel_map(len(paths), total_bytes) as parallel_map,
    ):
        for rows, messages, sha256 in parallel_map(partial(_index_shard, json_key=json_key), paths):
            reporter.update(INDEXING_STAGE, len(shards), len(paths))
            shards.append(_IndexedShard(len(rows), sha256))
            rows_file.write(rows.tobytes())
            messages_file.writelines(msgspec.json.encode(message) + b"\n" for message in messages)
            left_out += len(messages)
        (new / _INDEX).write_bytes(to_json(_Index(shards, left_out)))
    reporter.update(INDEXING_STAGE, len(paths), len(paths))


@contextmanager
def _parallel_map(tasks: int, total_bytes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield a map that runs in several processes, or in threads where processes cannot be forked."""
    workers = min(os.cpu_count() or 1, tasks, _MAX_WORKERS)
    if workers < 2 or total_bytes < _SERIAL_BYTES:
        yield map
        return
    pool: Executor
    if "fork" in get_all_start_methods():
        # Not spawned: that would import the user's script again. A worker leaves Ctrl-C to the main process.
        pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=signal, initargs=(SIGINT, SIG_IGN))
    else:
        pool = ThreadPoolExecutor(workers)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _index_shard(path: ShardFile, *, json_key: str | None) -> tuple[npt.NDArray[np.void], list[str], str]:
    """Return the rows of a shard's pairs, messages about its other samples, and the digest of its content."""
    shard = open_shard(path)
    has_image, has_text, has_json = shard.has("image"), shard.has("text"), shard.has("json")
    has_caption = has_json if json_key is not None else has_text | has_json
    messages = []
    for index in np.flatnonzero(~(has_caption & has_image)).tolist():
        missing = "image (.jpg, .png, .webp)" if not has_image[index] else "caption (.txt, .json)"
        messages.append(f"{shard.path}: {shard.name(index)} has no {missing}")
    if shard.damage:
        messages.append(f"{shard.path}: {shard.damage}")
    is_json = ~has_text | (json_key is not None)
    caption = np.where(is_json[:, None], shard.locations_of("json"), shard.locations_of("text"))
    rows = np.empty(len(shard), _ROW)
    rows["image"], rows["image_size"] = _columns(shard.locations_of("image"))
    rows["caption"], rows["caption_size"] = _columns(caption)
    rows["kind"] = is_json
    digest = hashlib.sha256(path.name.encode(errors="surrogateescape"))
    digest.update(shard.names.tobytes() + shard.locations.tobytes())
    return rows[has_caption & has_image], messages, digest.hexdigest()


def _columns(locations: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    # No image or caption of 4 GiB is read; see the limits where they are.
    return locations[:, 0], np.minimum(locations[:, 1], np.iinfo(np.uint32).max)
