"""The teacher's embeddings, computed once and read back row by row; and the bank of the term `bank`.

    manifest.json                      what the embeddings depend on
    texts/keys.npy                     (C, 1) a hash of each different caption, sorted
    texts/shard-T.npy                  (n, D) float16, for the keys T · SHARD_SIZE to T · SHARD_SIZE + n
    images/view-V/shard-S.npy          (n, D) float16, for the pairs S · SHARD_SIZE to S · SHARD_SIZE + n
    complete.json                      written last: nothing is missing

With a store, epoch e shows view e mod V: the same crops and captions return every V epochs, and the teacher takes no
part in a step. A store is refused if anything differs that its embeddings depend on; where the data lie does not
matter. The stores of several teachers lie side by side in FOLDER/teacher-SHA256, so that a run with some of them, or
with one more, finds what is there.

Images are stored by view and pair, captions once each, by a hash of their text. A pair that was bad when the store was
built, or for which the teacher computed no finite numbers, has a row of zeros. It is then bad in training, too.

An interrupted build continues where it stopped, as files are written atomically. Rows are read with plain reads, so
neither opening a store nor reading from it needs memory that grows with its size. Each row has a CRC-32, which is
checked when it is read, in about a microsecond.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.distillation.config import RunConfig, is_texts_alone
from clip_rd_edge.distillation.pixels import Crops
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.losses.terms import Bank, Ensemble
from clip_rd_edge.models.clip import ClipModel, model_fingerprint
from clip_rd_edge.utils.arrays import load_array, npy_bytes
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.outputs import exclusive_writer
from clip_rd_edge.utils.paths import is_file, is_left_by_system
from clip_rd_edge.utils.structs import read_json, to_json
from clip_rd_edge.utils.text import Reporter

MANIFEST, COMPLETE = "manifest.json", "complete.json"
FORMAT_VERSION = 1  # increase when the same manifest gives other embeddings, such as by other crops
SHARD_SIZE = 4096  # rows per shard: 4 MiB at D = 512
_OF_A_TEACHER = "teacher-"
_HEADER_BYTES = 128  # of .npy, for any number of these rows
HalfArray = npt.NDArray[np.float16]
_RUN_AGAIN = "run the command again, which computes what a store lacks, or copy the store again"


class StoreManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the embeddings of a store depend on; `teacher` and `data` only name it for people.

    Attributes:
        views: number of distinct views (crop and caption) of each pair.
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
    """Content of complete.json: C, the number of different captions."""

    captions: int


class RowFile(Sequence[Any]):
    """The rows of a file, each read and checked when it is asked for; open only within the `with` block.

    Args:
        count, width, dtype: of the rows, (count, width).
    """

    def __init__(self, path: Path, *, count: int, width: int, dtype: str = "<f2") -> None:
        self._path, self._count, self._type = path, count, _row_type(dtype, width)
        self._size_bytes = _HEADER_BYTES + count * self._type.itemsize

    def __enter__(self) -> RowFile:
        # Opening costs 10 µs, and leaves no position in an open file that worker processes would share.
        self.require_whole()
        self._file = self._path.open("rb", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        self._file.seek(_HEADER_BYTES + index * self._type.itemsize, io.SEEK_SET)
        content = self._file.read(self._type.itemsize)
        row = np.frombuffer(content, dtype=self._type)[0]
        if zlib.crc32(content[:-4]) != row["crc32"]:
            raise ConfigError(
                f"{self._path} is damaged: row {index:,} has changed since it was written.",
                hint=f"delete it, and {_RUN_AGAIN}",
            )
        return row["row"]

    def is_whole(self) -> bool:
        """Return whether the file exists and is as long as its rows; it is not opened."""
        return self._path.is_file() and self._path.stat().st_size == self._size_bytes

    def require_whole(self) -> None:
        """Raise ConfigError unless the file is whole."""
        if not self.is_whole():
            raise ConfigError(
                f"{self._path} is missing or damaged; expected {self._size_bytes:,} bytes, for {self._count:,} rows.",
                hint=_RUN_AGAIN,
            )


def _row_type(dtype: str, width: int) -> np.dtype[Any]:
    return np.dtype([("row", dtype, (width,)), ("crc32", "<u4")])


def write_rows(path: Path, rows: npt.NDArray[Any]) -> None:
    """Write rows, (n, D), with their checksums, atomically."""
    write_bytes(path, rows_with_checksums(rows))


def rows_with_checksums(rows: npt.NDArray[Any]) -> bytes:
    """Return the content of the file of these rows, (n, D)."""
    checked = np.empty(len(rows), _row_type(rows.dtype.str, rows.shape[1]))
    checked["row"] = rows
    checked["crc32"] = [zlib.crc32(row) for row in np.ascontiguousarray(rows)]
    return npy_bytes(checked)


def read_rows(files: Callable[[int], RowFile], rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Return some rows, in ascending order, of all shards together, (n, D)."""
    parts = []
    for own in np.split(rows, np.flatnonzero(np.diff(rows // SHARD_SIZE)) + 1):
        with files(int(own[0]) // SHARD_SIZE) as file:
            parts += [file[row] for row in (own % SHARD_SIZE).tolist()]
    return np.stack(parts)


@dataclass(frozen=True)
class TeacherStore:
    """The files of one teacher's store."""

    folder: Path
    manifest: StoreManifest
    captions: int

    def lookup(self, epoch: int, index: int, caption: str) -> tuple[HalfArray, HalfArray] | None:
        """Return the teacher's embeddings of a pair's image in an epoch and of a caption, (D,) each.

        None if one of them was bad when the store was built.
        """
        with self.images(epoch % self.manifest.views, index // SHARD_SIZE) as images:
            image: HalfArray = images[index % SHARD_SIZE]
        key = caption_key(caption)
        with self.keys() as keys:
            place = bisect_left(keys, key, key=lambda row: int(row[0]))
            if place == self.captions or keys[place][0] != key:
                return None
        with self.texts(place // SHARD_SIZE) as texts:
            text: HalfArray = texts[place % SHARD_SIZE]
        return (image, text) if image.any() and text.any() else None

    def keys(self) -> RowFile:
        """Return the keys of all different captions."""
        return RowFile(keys_file(self.folder), count=self.captions, width=1, dtype="<u8")

    def texts(self, shard: int) -> RowFile:
        """Return the embeddings of a shard's captions."""
        count = min(SHARD_SIZE, self.captions - shard * SHARD_SIZE)
        return RowFile(text_shard(self.folder, shard), count=count, width=self.manifest.embedding_size)

    def images(self, view: int, shard: int) -> RowFile:
        """Return the embeddings of a shard's images."""
        count = min(SHARD_SIZE, self.manifest.pairs - shard * SHARD_SIZE)
        return RowFile(image_shard(self.folder, view, shard), count=count, width=self.manifest.embedding_size)

    def files(self) -> Iterator[RowFile]:
        yield self.keys()
        yield from map(self.texts, range(len(shards(self.captions))))
        for view in range(self.manifest.views):
            yield from (self.images(view, shard) for shard in range(len(shards(self.manifest.pairs))))


@dataclass(frozen=True)
class TeacherStores:
    """The complete stores of one or several teachers, over the same views of the same pairs."""

    stores: tuple[TeacherStore, ...]

    def lookup(self, epoch: int, index: int, caption: str) -> tuple[HalfArray, HalfArray] | None:
        """Return what `TeacherStore.lookup` returns, of all stores side by side; None if one of them lacks it."""
        rows = [row for store in self.stores if (row := store.lookup(epoch, index, caption)) is not None]
        if len(rows) < len(self.stores):
            return None
        images, texts = zip(*rows, strict=True)
        return np.concatenate(images), np.concatenate(texts)


def caption_key(caption: str) -> int:
    """Return a hash of 64 bits: of 15 million captions, two share one with a probability of 6e-6."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little")


def shards(total: int) -> list[range]:
    """Return the rows of each shard of this number of rows."""
    return [range(start, min(start + SHARD_SIZE, total)) for start in range(0, total, SHARD_SIZE)]


def image_shard(folder: Path, view: int, shard: int) -> Path:
    return folder / "images" / f"view-{view:03d}" / f"shard-{shard:05d}.npy"


def text_shard(folder: Path, shard: int) -> Path:
    return folder / "texts" / f"shard-{shard:05d}.npy"


def keys_file(folder: Path) -> Path:
    return folder / "texts" / "keys.npy"


def load_rows(path: Path) -> npt.NDArray[Any]:
    """Return all rows of a file, (n, D), without their checksums."""
    rows: npt.NDArray[Any] = load_array(path)["row"]
    return rows


def store_folders(folder: Path, teachers: Sequence[ClipModel]) -> list[Path]:
    """Return the folder of each teacher's store: `folder` itself, or those of several teachers in it."""
    if len(teachers) == 1 and not any(folder.glob(f"{_OF_A_TEACHER}*")):
        return [folder]
    return [folder / f"{_OF_A_TEACHER}{model_fingerprint(teacher)[:16]}" for teacher in teachers]


def stored_precision(folder: Path) -> str | None:
    """Return the precision that a store of one or several teachers was computed in; None if there is none."""
    for path in (folder / MANIFEST, *sorted(folder.glob(f"{_OF_A_TEACHER}*/{MANIFEST}"))):
        if is_file(path):
            return read_json(path, StoreManifest).precision
    return None


@contextmanager
def sole_builder(folder: Path, manifest: StoreManifest, reporter: Reporter) -> Iterator[None]:
    """Begin a store, or resume the same one; other runs that need it wait until it is complete."""
    with exclusive_writer(folder, on_wait=reporter.note, option="{store}"):
        if not is_file(folder / MANIFEST):
            if any(not path.name.startswith(".") and not is_left_by_system(path) for path in folder.iterdir()):
                raise UsageError(f"{folder} is neither empty nor a teacher's store.", hint="choose another {store}")
            write_bytes(folder / MANIFEST, to_json(manifest))
        require_same_store(folder, manifest)
        (folder / COMPLETE).unlink(missing_ok=True)
        yield


def require_same_store(folder: Path, manifest: StoreManifest) -> None:
    """Refuse a store whose embeddings are others."""
    existing = _values(read_json(folder / MANIFEST, StoreManifest))
    for name, expected in _values(manifest).items():
        if name not in ("teacher", "data") and existing[name] != expected:
            raise UsageError(
                f"{folder} is a teacher's store, but its {name} is {existing[name]}; expected {expected}.",
                hint="choose another {store}, or use the options that it was made with",
            )


def _values(manifest: StoreManifest) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(manifest)
    return {**values.pop("crops"), **values}


def open_store(folder: Path) -> TeacherStore:
    """Open a complete store. Only the size of each file is looked at."""
    manifest = read_json(folder / MANIFEST, StoreManifest)
    store = TeacherStore(folder, manifest, read_json(folder / COMPLETE, CompleteStore).captions)
    for file in store.files():
        file.require_whole()
    return store


def open_stores(folders: Sequence[Path]) -> TeacherStores:
    """Open the complete stores of all teachers of a run."""
    return TeacherStores(tuple(map(open_store, folders)))


def make_bank(
    config: RunConfig,
    pairs: int,
    store: TeacherStores | None,
    ensemble: Ensemble | None,
    device: torch.device,
    *,
    source: str | None = None,
) -> TeacherBank | None:
    """Return the bank of a run, None if its objective does not need one.

    Args:
        pairs: number of pairs that the run trains on. Without a store, the bank holds no more: further entries would be
            those of the same pairs in earlier epochs.
        store: where the run's embeddings come from; None if they are computed as training goes.
        source: see `QueueBank`.
    """
    if not config.recipe.objective.needing("bank") or is_texts_alone(config):
        return None
    size = config.recipe.bank_size
    if store is not None and ensemble is not None:
        return StoredBank(store, ensemble, size=size, seed=config.seed, device=device)
    return QueueBank(min(size, pairs), device, source=source)


class StoredBank:
    """Embeddings from a teacher's store, the same in every step: all of view 0, or `size` images and captions of it."""

    def __init__(
        self, stored: TeacherStores, ensemble: Ensemble, *, size: int, seed: int, device: torch.device
    ) -> None:
        rng, stores = np.random.default_rng(seed), stored.stores

        def choice(count: int) -> npt.NDArray[np.int64]:
            return np.sort(rng.choice(count, min(size, count), replace=False, shuffle=False))

        def joined(parts: Sequence[HalfArray]) -> Tensor:
            readable = np.logical_and.reduce([part.any(axis=1) for part in parts])  # bad ones are zeros
            return ensemble.join([torch.from_numpy(part[readable]).to(device).float() for part in parts])

        pairs = choice(stores[0].manifest.pairs)
        images = [read_rows(partial(store.images, 0), pairs) for store in stores]
        common = _common_captions(stores)
        captions = choice(len(common[0]) if common else stores[0].captions)
        own = [rows[captions] for rows in common] or [captions]
        texts = [read_rows(store.texts, rows) for store, rows in zip(stores, own, strict=True)]
        self._bank = Bank(joined(images), joined(texts))

    def with_batch(self, image: Tensor, text: Tensor) -> Bank:
        """Return the bank, which a batch does not change."""
        return self._bank


def _common_captions(stores: Sequence[TeacherStore]) -> list[npt.NDArray[np.int64]]:
    """Return the rows of the captions that all of several stores have, in the same order; nothing for a single store.

    A caption that could not be read while one of them was built is missing there alone.
    """
    if len(stores) == 1:
        return []
    keys = [load_rows(keys_file(store.folder))[:, 0] for store in stores]
    common = reduce(np.intersect1d, keys)
    return [np.searchsorted(own, common) for own in keys]


class QueueBank:
    """The teacher's embeddings of the last pairs, those of the step included, in a ring buffer.

    Args:
        size: max number of pairs.
        source: names the teachers: a state with the embeddings of others is not loaded, as they lie in another space;
            nor is one of another size, of data that have become more or fewer pairs.
    """

    def __init__(self, size: int, device: torch.device, *, source: str | None = None) -> None:
        self._size, self._device, self._source = size, device, source
        self._rows = torch.empty(2, 0, 0)  # (2, size, D): images and texts; the embedding size is that of the batches
        self._seen = 0

    def with_batch(self, image: Tensor, text: Tensor) -> Bank:
        """Return the bank of a step whose global batch has these embeddings of the teacher, (B, D) each."""
        if not self._seen:
            self._rows = image.new_empty(2, self._size, image.shape[1])
        newest = torch.stack([image, text])[:, -self._size :]
        positions = torch.arange(self._seen, self._seen + newest.shape[1], device=image.device) % self._size
        self._rows[:, positions] = newest
        self._seen += newest.shape[1]
        return Bank(*self._filled())

    def drop_not_finite(self) -> None:
        """Drop embeddings that are not finite: with them, the loss of every further step would not be, either."""
        rows = self._filled()
        rows = rows.roll(-(self._seen % rows.shape[1]), dims=1)  # the oldest first
        rows = rows[:, rows.isfinite().all(dim=2).all(dim=0)]
        if rows.shape[1] < self._filled().shape[1]:
            self._seen = rows.shape[1]
            self._rows[:, : self._seen] = rows

    def state_dict(self) -> dict[str, Any]:
        """Return the embeddings, for a checkpoint."""
        return {"seen": self._seen, "rows": self._filled().clone(), "source": self._source}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rows, seen = state["rows"].to(self._device), state["seen"]
        if state["source"] == self._source and rows.shape[1] == min(seen, self._size):
            self._rows, self._seen = rows.new_empty(2, self._size, rows.shape[2]), seen
            self._filled()[:] = rows

    def _filled(self) -> Tensor:
        return self._rows[:, : min(self._seen, self._size)]


TeacherBank = StoredBank | QueueBank  # all processes have the same one, whatever their number
