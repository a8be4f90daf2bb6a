"""The teacher's embeddings, computed once and read back row by row.

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
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.distillation.pixels import Crops
from clip_rd_edge.errors import ConfigError, InputError, UsageError
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
    """Return some rows of all shards together, (n, D).

    Args:
        files: returns the file of a shard.
        rows: ascending.
    """
    parts = []
    for own in np.split(rows, np.flatnonzero(np.diff(rows // SHARD_SIZE)) + 1):
        with files(int(own[0]) // SHARD_SIZE) as file:
            parts += [file[row] for row in (own % SHARD_SIZE).tolist()]
    return np.stack(parts)


@dataclass(frozen=True)
class TeacherStore:
    """The files of one teacher's store.

    Attributes:
        captions: C, the number of different captions.
    """

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
        rows = shard_rows(shard, self.captions)
        return RowFile(text_shard(self.folder, shard), count=len(rows), width=self.manifest.embedding_size)

    def images(self, view: int, shard: int) -> RowFile:
        """Return the embeddings of a shard's images."""
        rows = shard_rows(shard, self.manifest.pairs)
        return RowFile(image_shard(self.folder, view, shard), count=len(rows), width=self.manifest.embedding_size)

    def require_whole(self) -> None:
        """Raise ConfigError if a file is missing or not as long as its rows; none is opened."""
        self.keys().require_whole()
        for shard in range(shard_count(self.captions)):
            self.texts(shard).require_whole()
        for view in range(self.manifest.views):
            for shard in range(shard_count(self.manifest.pairs)):
                self.images(view, shard).require_whole()


@dataclass(frozen=True)
class TeacherStores:
    """The complete stores of one or several teachers, over the same views of the same pairs."""

    stores: tuple[TeacherStore, ...]

    def lookup(self, epoch: int, index: int, caption: str) -> tuple[HalfArray, HalfArray] | None:
        """See `loader.EmbeddingSource`."""
        rows = [store.lookup(epoch, index, caption) for store in self.stores]
        found = [row for row in rows if row is not None]
        if len(found) < len(rows):
            return None
        images, texts = zip(*found, strict=True)
        return np.concatenate(images), np.concatenate(texts)


def caption_key(caption: str) -> int:
    """Return a hash of 64 bits: of 15 million captions, two share one with a probability of 6e-6."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little")


def shard_count(rows: int) -> int:
    """Return the number of shards for this number of rows."""
    return -(-rows // SHARD_SIZE)


def shard_rows(shard: int, total: int) -> range:
    """Return the rows of a shard."""
    return range(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, total))


def shards(total: int) -> list[tuple[int, range]]:
    """Return each shard of this number of rows with its rows."""
    return [(shard, shard_rows(shard, total)) for shard in range(shard_count(total))]


def image_shard(folder: Path, view: int, shard: int) -> Path:
    """Return the path of a shard of image embeddings."""
    return folder / "images" / f"view-{view:03d}" / f"shard-{shard:05d}.npy"


def text_shard(folder: Path, shard: int) -> Path:
    """Return the path of a shard of text embeddings."""
    return folder / "texts" / f"shard-{shard:05d}.npy"


def keys_file(folder: Path) -> Path:
    """Return the path of the keys of all different captions."""
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


def is_complete(folder: Path, manifest: StoreManifest) -> bool:
    """Return whether there is such a store, and nothing is missing in it; refuse that of another teacher or data."""
    if not is_file(folder / MANIFEST):
        return False
    require_same_store(folder, manifest)
    try:
        open_store(folder)
    except (ConfigError, InputError):  # it was interrupted, or has lost a file, or a part of one
        return False
    return True


def open_store(folder: Path) -> TeacherStore:
    """Open a complete store. Only the size of each file is looked at."""
    manifest = read_json(folder / MANIFEST, StoreManifest)
    store = TeacherStore(folder, manifest, read_json(folder / COMPLETE, CompleteStore).captions)
    store.require_whole()
    return store


def open_stores(folders: Sequence[Path]) -> TeacherStores:
    """Open the complete stores of all teachers of a run."""
    return TeacherStores(tuple(map(open_store, folders)))
