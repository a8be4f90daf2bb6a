"""What the indices of shards and of tables have in common: where they are kept, how they are built, and messages."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import os
import shutil
import signal
import tempfile
import threading
import weakref
import zipfile
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.data.remote import RemoteShard, ShardFile, Version, open_file, shard_identity, versions
from clip_rd_edge.data.tar import COLUMNS, REINFORCED_COLUMNS, Kind, SampleGroups, TarScan, member_name, read_at
from clip_rd_edge.errors import ConfigError, InputError, LostProcessError, UnreachableError, UsageError
from clip_rd_edge.utils.arrays import HEADERS, npz_bytes
from clip_rd_edge.utils.files import machine_failure, now_in, write_bytes
from clip_rd_edge.utils.host import usable_cores
from clip_rd_edge.utils.outputs import exclusive_writer, new_folder
from clip_rd_edge.utils.paths import cache_home
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import read_json, to_json

INDEX = "index.json"
_MAX_WORKERS = 8
_WAITING_RESULTS = 2  # per worker
_UNUSED_S = 30 * 24 * 3600
T = TypeVar("T")
R = TypeVar("R")


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

    @staticmethod
    def encode(messages: Iterable[str]) -> bytes:
        """Return the messages as they are stored; what is not UTF-8 in a path, as an escape."""
        printable = (message.encode(errors="backslashreplace").decode() for message in messages)
        return b"".join(msgspec.json.encode(message) + b"\n" for message in printable)


def kept_index(kind: str, identity: Iterable[str], build: Callable[[Path], None]) -> Path:
    """Return the folder of an index: the one in the cache, or else one that is built now.

    Several processes that need the same index build it once. Indices of this kind that nobody has opened for 30 days
    are removed. Where the cache is full or read-only, the index lasts as long as this process.

    Args:
        kind: name of the folder of all such indices.
        identity: texts of which another one makes another index.
        build: fills an empty folder; the file INDEX is written last.
    """
    key = hashlib.sha256("\n".join(identity).encode(errors="surrogateescape")).hexdigest()[:32]
    folder = cache_home() / kind / key
    if _is_complete(folder):
        return folder
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_writer(folder.with_suffix(".lock.d"), on_wait=lambda message: None))
        except UsageError:  # it cannot be written
            return _temporary_index(build)
        if not _is_complete(folder):
            try:
                _remove_unused(folder.parent)
                with new_folder(folder) as new:
                    build(new)
            except OSError:
                return _temporary_index(build)
    return folder


def damage(folder: Path, number: int) -> ConfigError:
    """Return the error for a pair, counted from 0, whose entry in an index has changed since it was written."""
    return ConfigError(
        f"The index {folder} is damaged: its entry of pair {number:,} has changed since it was written.",
        hint="delete it; it is made again",
    )


def _is_complete(folder: Path) -> bool:
    """Return whether an index is there, and mark it as used now."""
    with contextlib.suppress(OSError):
        os.utime(folder / INDEX)
    with contextlib.suppress(OSError):  # a cache in a folder that this user may not enter
        return (folder / INDEX).is_file()
    return False


def _remove_unused(indices: Path) -> None:
    now = now_in(indices)
    for path in indices.glob(f"*/{INDEX}"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < now - _UNUSED_S:
                path.unlink()  # first: what is removed in part is no index
                shutil.rmtree(path.parent)


def _temporary_index(build: Callable[[Path], None]) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="clip-rd-edge-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build(folder)
    return folder


class OrderedMap(Protocol):
    """Maps a function over items, as `map` does."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]: ...


def _in_turn(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    return map(function, items)


@contextmanager
def ordered_map(*, parallel: bool) -> Iterator[OrderedMap]:
    """Yield a map that computes in several processes, or in threads where processes cannot be forked or share nothing.

    It runs ahead of whoever takes the results by a few items per process, so that memory is bounded.

    Args:
        parallel: whether the work is worth starting processes.
    """
    workers = min(usable_cores(), _MAX_WORKERS)
    if workers < 2 or not parallel:
        yield _in_turn
        return
    pool = _pool(workers)

    def run(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _WAITING_RESULTS * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise LostProcessError(
                "A process that reads the data was ended from outside, most likely for want of memory.",
                hint="give the machine or container more memory, then run the same command again",
            ) from error

    try:
        yield run
    except BaseException:
        # What they work on is no longer needed, and a store that does not answer would keep them for minutes.
        for process in tuple((getattr(pool, "_processes", None) or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> Executor:
    if "fork" in get_all_start_methods():
        # Not spawned: that would import the user's script again.
        with contextlib.suppress(OSError, ImportError, NotImplementedError):  # no semaphores, as without /dev/shm
            return ProcessPoolExecutor(workers, get_context("fork"), initializer=_obey_the_pool)
    return ThreadPoolExecutor(workers)


def _obey_the_pool() -> None:
    """Leave Ctrl-C and a lost terminal to the main process, which ends its workers, and end when it says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
