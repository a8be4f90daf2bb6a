"""The teacher's embeddings, computed once and read back row by row.

    manifest.json                      what the embeddings depend on
    images/view-V/shard-S.npy          (n,) rows of D float16, for the pairs S · SHARD_SIZE to S · SHARD_SIZE + n
    captions/shard-S.npy               the keys of these pairs' captions, and the number of the pair of each
    texts/keys.npy                     (C,) keys of all different captions, sorted
    texts/pairs.npy                    (C,) a pair that has the caption
    texts/shard-T.npy                  (n,) rows of D float16, for the keys T · SHARD_SIZE to T · SHARD_SIZE + n
    complete.json                      written last: nothing is missing; with the CRC-32 of keys.npy

With a cache, epoch e shows view e mod V: the same crops and captions return every V epochs, and the teacher takes no
part in a step. A cache is rejected if anything differs that its embeddings depend on; where the data lie does not
matter.

The embeddings of several teachers are several caches side by side, in a folder each: FOLDER/teacher-SHA256, after the
teacher's fingerprint, so that a run with some of the teachers, or with another one more, finds what is there.

Images are stored by view and pair, captions once each, by a hash of their text. A pair that could not be read when the
cache was built, or for which the teacher computed no finite numbers, has a row of zeros, which no embedding is: it is
then bad in training, too, and another pair takes its place with its own row.

Files are written atomically, so several processes or machines can build one cache together, and an interrupted build
continues where it stopped. Rows are read with plain reads, so neither opening a cache nor reading from it needs memory
that grows with its size, and worker processes share the operating system's cache of the files. Each row of embeddings
has its CRC-32, which is checked whenever it is read, in about a microsecond; keys.npy, when a cache is opened.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.distillation.loader import HalfArray
from clip_rd_edge.distillation.pixels import Crops
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.models.clip import ClipModel, model_fingerprint
from clip_rd_edge.utils.arrays import npy_bytes
from clip_rd_edge.utils.files import named_failures, write_bytes
from clip_rd_edge.utils.outputs import LOCK_FILE, exclusive_writer
from clip_rd_edge.utils.paths import is_file, is_folder, is_left_by_system
from clip_rd_edge.utils.structs import read_json, to_json

MANIFEST, COMPLETE = "manifest.json", "complete.json"
FORMAT_VERSION = 4  # increase when the same manifest gives other embeddings, such as by other crops
SHARD_SIZE = 4096  # rows per shard: 4 MiB at D = 512
KEY, _CRC32 = np.dtype("<u8"), np.dtype("<u4")
_HEADER_BYTES = 128  # of .npy, before the rows: of any number of them
_RUN_AGAIN = "run the command again, which computes what a teacher's store lacks, or copy the store again"


class StoreManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the embeddings of a cache depend on; `teacher` and `data` only name it for people.

    Attributes:
        teacher_sha256: see `model_fingerprint`.
        pairs_sha256: see `data.samples.fingerprint`.
        views: number of distinct views (crop and caption) of each pair.
        precision: precision that the teacher computed in.
    """

    format_version: int = FORMAT_VERSION
    teacher: str
    teacher_sha256: str
    logit_scale: float
    embedding_size: int
    preprocessing: Preprocessing
    crops: Crops
    seed: int
    views: int
    data: str
    pairs: int
    pairs_sha256: str
    precision: str


class CompleteStore(msgspec.Struct, frozen=True):
    """Content of complete.json: the number of different captions, and the CRC-32 of the file of their keys."""

    captions: int
    keys_crc32: int


class RowFile(Sequence[Any]):
    """Rows of a .npy file, each read when it is asked for; the file is open only within the `with` block.

    Args:
        count: number of rows in the file.
        dtype: of a row; that of `embedding_rows` is checked, and returned without its checksum.
    """

    def __init__(self, path: Path, *, count: int, dtype: np.dtype[Any]) -> None:
        self._path, self._count, self._dtype = path, count, dtype
        self._size_bytes = _HEADER_BYTES + count * dtype.itemsize

    def __enter__(self) -> RowFile:
        # Opening costs 10 µs, and leaves no position in an open file that worker processes would share.
        try:
            self._file = self._path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise self._not_whole(None) from error
        if (size := self._file.seek(0, io.SEEK_END)) != self._size_bytes:
            self._file.close()
            raise self._not_whole(size)
        return self

    def is_whole(self) -> bool:
        """Return whether the file exists and is as long as its rows; it is not opened."""
        return self._actual_bytes() == self._size_bytes

    def require_whole(self) -> None:
        """Raise ConfigError unless the file is whole."""
        if (size := self._actual_bytes()) != self._size_bytes:
            raise self._not_whole(size)

    def _actual_bytes(self) -> int | None:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return None

    def _not_whole(self, size: int | None) -> ConfigError:
        problem = "is missing" if size is None else f"is damaged: it has {size:,} bytes"
        return ConfigError(
            f"{self._path} {problem}; expected {self._size_bytes:,} bytes, for {self._count:,} rows.", hint=_RUN_AGAIN
        )

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        self._file.seek(_HEADER_BYTES + index * self._dtype.itemsize)
        content = self._file.read(self._dtype.itemsize)
        row = np.frombuffer(content, dtype=self._dtype)[0]
        if not self._dtype.names:
            return row
        if zlib.crc32(content[: -_CRC32.itemsize]) != row["crc32"]:
            raise ConfigError(
                f"{self._path} is damaged: row {index:,} has changed since it was written.",
                hint=f"delete it, and {_RUN_AGAIN}",
            )
        return row["row"]


@dataclass(frozen=True)
class TeacherStore:
    """Reads a complete cache.

    Attributes:
        captions: C, the number of different captions.
    """

    folder: Path
    manifest: StoreManifest
    captions: int

    def lookup(self, epoch: int, index: int, caption: str) -> tuple[HalfArray, HalfArray] | None:
        """Return the teacher's embeddings of a pair's image in an epoch and of a caption, (D,) each.

        None if one of them could not be read or embedded when the cache was built.
        """
        with self._images(epoch % self.manifest.views, index // SHARD_SIZE) as images:
            image: HalfArray = images[index % SHARD_SIZE]
        key = caption_key(caption)
        with self._keys() as keys:
            row = bisect_left(keys, key)
            if row == self.captions or keys[row] != key:
                return None
        with self._texts(row // SHARD_SIZE) as texts:
            text: HalfArray = texts[row % SHARD_SIZE]
        return (image, text) if is_embedding(image) and is_embedding(text) else None

    def require_whole(self) -> None:
        """Raise ConfigError if a file is missing or not as long as its rows; none is opened."""
        self._keys().require_whole()
        for shard in range(shard_count(self.captions)):
            self._texts(shard).require_whole()
        for view in range(self.manifest.views):
            for shard in range(shard_count(self.manifest.pairs)):
                self._images(view, shard).require_whole()

    def _keys(self) -> RowFile:
        return RowFile(keys_file(self.folder), count=self.captions, dtype=KEY)

    def _texts(self, shard: int) -> RowFile:
        rows = shard_rows(shard, self.captions)
        return embedding_file(text_shard(self.folder, shard), rows, width=self.manifest.embedding_size)

    def _images(self, view: int, shard: int) -> RowFile:
        rows = shard_rows(shard, self.manifest.pairs)
        return embedding_file(image_shard(self.folder, view, shard), rows, width=self.manifest.embedding_size)


def embedding_file(path: Path, rows: range, *, width: int) -> RowFile:
    """Return the file of a shard with these rows, (width,) each."""
    return RowFile(path, count=len(rows), dtype=_row_type(width))


def _row_type(width: int) -> np.dtype[Any]:
    return np.dtype([("row", "<f2", (width,)), ("crc32", _CRC32)])


def with_checksums(rows: HalfArray) -> npt.NDArray[np.void]:
    """Return what the file of a shard with these rows, (n, D), holds: (n,)."""
    checked = np.empty(len(rows), _row_type(rows.shape[1]))
    checked["row"] = rows
    checked["crc32"] = [zlib.crc32(row) for row in np.ascontiguousarray(rows)]
    return checked


def keys_file(folder: Path) -> Path:
    """Return the path of the keys of all different captions."""
    return folder / "texts" / "keys.npy"


def keys_crc32(folder: Path) -> int:
    """Return the CRC-32 of the file of keys, reading it in parts."""
    crc32 = 0
    with keys_file(folder).open("rb") as file:
        while block := file.read(1 << 15):
            crc32 = zlib.crc32(block, crc32)
    return crc32


@dataclass(frozen=True)
class TeacherStores:
    """Reads the complete caches of one or several teachers, over the same views of the same pairs."""

    caches: tuple[TeacherStore, ...]

    def lookup(self, epoch: int, index: int, caption: str) -> tuple[HalfArray, HalfArray] | None:
        """See `loader.EmbeddingSource`."""
        rows = [row for cache in self.caches if (row := cache.lookup(epoch, index, caption)) is not None]
        if len(rows) < len(self.caches):
            return None
        images, texts = zip(*rows, strict=True)
        return np.concatenate(images), np.concatenate(texts)


def is_embedding(rows: HalfArray) -> npt.NDArray[np.bool_]:
    """Return which rows, (…, D), are embeddings: not zeros, and finite. Caches of earlier versions may hold others."""
    embedded: npt.NDArray[np.bool_] = np.logical_and(rows.any(axis=-1), np.isfinite(rows).all(axis=-1))
    return embedded


def caption_key(caption: str) -> int:
    """Return a hash of 64 bits: of 15 million captions, two share one with a probability of 6e-6."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=KEY.itemsize).digest(), "little")


def shard_count(rows: int) -> int:
    """Return the number of shards for this number of rows."""
    return -(-rows // SHARD_SIZE)


def shard_rows(shard: int, total: int) -> range:
    """Return the rows of a shard."""
    return range(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, total))


def image_shard(folder: Path, view: int, shard: int) -> Path:
    """Return the path of a shard of image embeddings."""
    return folder / "images" / f"view-{view:03d}" / f"shard-{shard:05d}.npy"


def text_shard(folder: Path, shard: int) -> Path:
    """Return the path of a shard of text embeddings."""
    return folder / "texts" / f"shard-{shard:05d}.npy"


def caption_shard(folder: Path, shard: int) -> Path:
    """Return the path of the keys of the captions of a shard's pairs."""
    return folder / "captions" / f"shard-{shard:05d}.npy"


def store_folders(folder: Path, teachers: Sequence[ClipModel]) -> list[Path]:
    """Return the folder of each teacher's store: `folder` itself, or those of several teachers in it."""
    if is_file(folder):
        raise UsageError(f"The output {folder} is a file; expected a folder.", hint="choose another {store}")
    beside = is_folder(folder) and any(folder.glob(f"{_OF_A_TEACHER}*"))
    if len(teachers) == 1 and not beside:
        return [folder]
    if is_file(folder / MANIFEST):
        raise UsageError(
            f"The teacher's store {folder} is that of one teacher, but the run has {len(teachers)}.",
            hint="choose another {store}",
        )
    if is_folder(folder) and _holds_others(folder, (_OF_A_TEACHER,)):
        raise UsageError(f"{folder} is neither empty nor a teacher's store.", hint="choose another {store}")
    return [folder / f"{_OF_A_TEACHER}{model_fingerprint(teacher)[:_SHORT]}" for teacher in teachers]


def manifests(folder: Path) -> list[Path]:
    """Return the paths of the manifests of a cache of one teacher, or of several."""
    return [path for path in (folder / MANIFEST, *sorted(folder.glob(f"{_OF_A_TEACHER}*/{MANIFEST}"))) if is_file(path)]


_OF_A_TEACHER, _SHORT = "teacher-", 16


def claim_store(folder: Path, manifest: StoreManifest) -> None:
    """Write a manifest into a new folder, or check that the folder has the same one; jobs may do so at once."""
    path, hint = folder / MANIFEST, "choose another --store"
    if is_file(folder):
        raise UsageError(f"The output {folder} is a file; expected a folder.", hint=hint)
    if not is_file(path):
        with exclusive_writer(folder, on_wait=lambda message: None, option="--store"):
            if not is_file(path):
                if _holds_others(folder, (LOCK_FILE, f".{path.name}.")):  # the latter of a job that was killed
                    raise UsageError(f"{folder} is neither empty nor a teacher's store.", hint=hint)
                with named_failures(folder, hint=hint):
                    write_bytes(path, to_json(manifest))
    existing = read_json(path, StoreManifest)
    for name in manifest.__struct_fields__:
        actual, expected = getattr(existing, name), getattr(manifest, name)
        if name not in ("teacher", "data") and actual != expected:
            raise UsageError(
                f"{folder} is a teacher's store, but its {name} is {actual}; expected {expected}.",
                hint=f"{hint}, or use the options that it was made with",
            )


def _holds_others(folder: Path, own: tuple[str, ...]) -> bool:
    """Return whether a folder holds files with other beginnings than these that somebody has put there."""
    return any(not path.name.startswith(own) and not is_left_by_system(path) for path in folder.iterdir())


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a .npy file atomically."""
    write_bytes(path, npy_bytes(array))


def open_store(folder: Path) -> TeacherStore:
    """Open a complete cache. No embedding is read, only the keys and the size of each file."""
    manifest = read_json(folder / MANIFEST, StoreManifest)
    if not (folder / COMPLETE).is_file():
        raise ConfigError(f"The teacher's store {folder} is not complete.", hint="finish building it first")
    complete = read_json(folder / COMPLETE, CompleteStore)
    cache = TeacherStore(folder, manifest, complete.captions)
    cache.require_whole()
    if keys_crc32(folder) != complete.keys_crc32:
        raise ConfigError(f"{keys_file(folder)} is damaged: it has changed since it was written.", hint=_RUN_AGAIN)
    return cache


def open_stores(folders: Sequence[Path]) -> TeacherStores:
    """Open the complete caches of all teachers of a run; raises as `open_store`."""
    return TeacherStores(tuple(map(open_store, folders)))
