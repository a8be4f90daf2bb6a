"""The teacher's embeddings, computed once and read back row by row.

    manifest.json                      what the embeddings depend on
    images/view-V/shard-S.npy          (n, D) float16, for the pairs S · SHARD_SIZE to S · SHARD_SIZE + n
    captions/shard-S.npy               the keys of these pairs' captions, and the number of the pair of each
    texts/keys.npy                     (C,) keys of all different captions, sorted
    texts/pairs.npy                    (C,) a pair that has the caption
    texts/shard-T.npy                  (n, D) float16, for the keys T · SHARD_SIZE to T · SHARD_SIZE + n
    complete.json                      written last: nothing is missing

With a cache, epoch e shows view e mod V: the same crops and captions return every V epochs, and the teacher is not even
loaded. A cache is rejected if anything differs that its embeddings depend on; where the data lie does not matter.

Images are stored by view and pair, captions once each, by a hash of their text. A pair that could not be read when the
cache was built has a row of zeros, which no embedding is: it is then bad in training, too, and another pair takes its
place with its own row.

Files are written atomically, so several processes or machines can build one cache together, and an interrupted build
continues where it stopped. Rows are read with plain reads, so neither opening a cache nor reading from it needs memory
that grows with its size, and worker processes share the operating system's cache of the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clip_rd_edge.contract.encoder import in_batches
from clip_rd_edge.contract.preprocess import Preprocessing
from clip_rd_edge.data.pairs import Pairs, fingerprint
from clip_rd_edge.distillation.distributed import Processes
from clip_rd_edge.distillation.loader import HalfArray, View, ViewDataset, step_loader
from clip_rd_edge.distillation.pixels import Crops
from clip_rd_edge.distillation.teacher import Teacher
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.utils.arrays import load_array
from clip_rd_edge.utils.io import read_json, to_json, write_bytes
from clip_rd_edge.utils.paths import is_file, is_folder
from clip_rd_edge.utils.reporting import SILENT, Reporter

MANIFEST, COMPLETE = "manifest.json", "complete.json"
FORMAT_VERSION = 3  # increase when the same manifest gives other embeddings, such as by other crops
SHARD_SIZE = 4096  # rows per shard: 4 MiB at D = 512
KEY = np.dtype("<u8")


class CacheManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the embeddings of a cache depend on; `teacher` and `data` only name it for people.

    Attributes:
        teacher_sha256: see `teacher_fingerprint`.
        pairs_sha256: see `data.pairs.fingerprint`.
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


class _Complete(msgspec.Struct, frozen=True):
    """Content of complete.json: the number of different captions."""

    captions: int


class RowFile(Sequence[Any]):
    """Rows of a .npy file, each read when it is asked for; the file is open only within the `with` block.

    Args:
        count: number of rows in the file.
        shape: shape of a row.
    """

    def __init__(self, path: Path, *, count: int, dtype: npt.DTypeLike, shape: tuple[int, ...] = ()) -> None:
        self._path, self._count, self._shape = path, count, shape
        self._dtype = np.dtype(dtype)
        self._row_bytes = self._dtype.itemsize * int(np.prod(shape, dtype=np.int64))

    def __enter__(self) -> RowFile:
        # Opening costs 10 µs, and leaves no position in an open file that worker processes would share.
        self._file = self._path.open("rb", buffering=0)
        self._start = self._file.seek(0, io.SEEK_END) - self._count * self._row_bytes  # after the header of .npy
        if self._start <= 0:
            self._file.close()
            raise ConfigError(
                f"{self._path} is damaged: it is too short for {self._count} rows.",
                hint="delete it, and build it again",
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        self._file.seek(self._start + index * self._row_bytes)
        row = np.frombuffer(self._file.read(self._row_bytes), dtype=self._dtype)
        return row.reshape(self._shape) if self._shape else row[0]


@dataclass(frozen=True)
class TeacherCache:
    """Reads a complete cache.

    Attributes:
        captions: C, the number of different captions.
    """

    folder: Path
    manifest: CacheManifest
    captions: int

    def lookup(self, epoch: int, index: int, caption: str) -> tuple[HalfArray, HalfArray] | None:
        """Return the teacher's embeddings of a pair's image in an epoch and of a caption, (D,) each.

        None if one of them could not be read when the cache was built.
        """
        path = image_shard(self.folder, epoch % self.manifest.views, index // SHARD_SIZE)
        image = self._row(path, index, of=self.manifest.pairs)
        key = caption_key(caption)
        with RowFile(self.folder / "texts" / "keys.npy", count=self.captions, dtype=KEY) as keys:
            row = bisect_left(keys, key)
            if row == self.captions or keys[row] != key:
                return None
        text = self._row(text_shard(self.folder, row // SHARD_SIZE), row, of=self.captions)
        return (image, text) if image.any() and text.any() else None

    def _row(self, path: Path, index: int, *, of: int) -> HalfArray:
        shape = (self.manifest.embedding_size,)
        with RowFile(path, count=len(_shard_rows(index // SHARD_SIZE, of)), dtype="<f2", shape=shape) as rows:
            row: HalfArray = rows[index % SHARD_SIZE]
        return row


def caption_key(caption: str) -> int:
    """Return a hash of 64 bits: of 15 million captions, two share one with a probability of 6e-6."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=KEY.itemsize).digest(), "little")


def shard_count(rows: int) -> int:
    """Return the number of shards for this number of rows."""
    return -(-rows // SHARD_SIZE)


def _shard_rows(shard: int, total: int) -> range:
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


def claim_folder(folder: Path, manifest: CacheManifest) -> None:
    """Write the manifest into a new cache `folder`, or check that an existing cache has the same one.

    Raises:
        UsageError: the folder is a cache with another manifest (the first difference is named), or not a cache.
    """
    path = folder / MANIFEST
    if is_file(path):
        try:
            existing = read_json(path, CacheManifest)
        except ConfigError as error:
            raise UsageError(
                f"{folder} is not a teacher cache of this version of clip-rd-edge: {error}",
                hint="choose another --teacher-cache, or delete it",
            ) from error
        for name in CacheManifest.__struct_fields__:
            actual, expected = getattr(existing, name), getattr(manifest, name)
            if name not in ("teacher", "data") and actual != expected:
                raise UsageError(
                    f"The teacher cache {folder} does not fit this run: its {name} is {actual}, expected {expected}.",
                    hint="choose another --teacher-cache, or use the options that it was made with",
                )
    elif is_folder(folder) and any(folder.iterdir()):
        raise UsageError(f"{folder} is neither empty nor a teacher cache.", hint="choose another --teacher-cache")
    else:
        write_bytes(path, to_json(manifest))


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a .npy file atomically."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def open_cache(folder: Path) -> TeacherCache:
    """Open a complete cache. Its size does not matter: no embedding is read.

    Raises:
        ConfigError: the manifest cannot be read, or the cache is not complete.
    """
    manifest = read_json(folder / MANIFEST, CacheManifest)
    if not (folder / COMPLETE).is_file():
        raise ConfigError(f"The teacher cache {folder} is not complete.", hint="finish building it first")
    return TeacherCache(folder, manifest, read_json(folder / COMPLETE, _Complete).captions)


BATCH_SIZE = 64
CACHING_STAGE = "caching the teacher's embeddings (shards)"  # name of the stage in progress reports


def make_manifest(
    teacher: ClipModel, pairs: Pairs, *, crops: Crops, seed: int, views: int, precision: str
) -> CacheManifest:
    """Return the manifest of a cache of this teacher over these pairs."""
    return CacheManifest(
        teacher=teacher.name,
        teacher_sha256=teacher_fingerprint(teacher),
        logit_scale=teacher.logit_scale,
        embedding_size=teacher.embedding_size,
        preprocessing=teacher.preprocessing,
        crops=crops,
        seed=seed,
        views=views,
        data=pairs.name,
        pairs=len(pairs),
        pairs_sha256=fingerprint(pairs),
        precision=precision,
    )


def build_cache(
    folder: Path,
    manifest: CacheManifest,
    teacher: Teacher,
    pairs: Pairs,
    processes: Processes,
    *,
    workers: int,
    max_bad: float,
    reporter: Reporter = SILENT,
) -> None:
    """Compute what is missing in `folder`; each process computes its share of the shards.

    Args:
        workers: loader processes; see `step_loader`.
        max_bad: max fraction of the samples that may be unreadable.
        reporter: receives the number of completed shards.

    Raises:
        UsageError: `folder` is a cache with another manifest, or not a cache.
        InputError: too many pairs cannot be read.
    """
    processes.on_main(lambda: claim_folder(folder, manifest))
    with processes.together():
        complete = _is_complete(folder, manifest, processes)
    if processes.sum(int(complete))[0] == processes.world_size:
        return
    build = _Build(folder, manifest, teacher, pairs, workers=workers, max_bad=max_bad)
    shards = range(shard_count(len(pairs)))
    _compute({caption_shard(folder, s): build.caption_keys for s in shards}, processes, reporter)
    keys = folder / "texts" / "keys.npy"
    if processes.is_main and not keys.is_file():
        build.merge_captions(keys)
    processes.barrier()
    captions = len(load_array(keys, memory_mapped=True))
    _compute({text_shard(folder, s): build.texts for s in range(shard_count(captions))}, processes, reporter)
    views = range(manifest.views)
    _compute({image_shard(folder, v, s): build.images for v in views for s in shards}, processes, reporter)
    if processes.is_main:
        write_bytes(folder / COMPLETE, to_json(_Complete(captions)))
    processes.barrier()


def _is_complete(folder: Path, manifest: CacheManifest, processes: Processes) -> bool:
    """Return whether a cache is complete, for a process that sees what the main one has claimed."""
    if not processes.is_main and not is_file(folder / MANIFEST):
        raise UsageError(
            f"The teacher cache {folder} is not on a file system that the machines share.",
            hint="choose another --teacher-cache, or copy a complete one to each machine",
        )
    claim_folder(folder, manifest)
    return is_file(folder / COMPLETE)


def _compute(tasks: dict[Path, Callable[[Path], npt.NDArray[Any]]], processes: Processes, reporter: Reporter) -> None:
    """Write the missing files, each with what its function returns for it."""
    missing = [path for path in tasks if not path.is_file()]
    processes.barrier()  # before the first one is written, so that all processes list the same ones
    mine = missing[processes.rank :: processes.world_size]
    for done, path in enumerate(mine):
        reporter.update(CACHING_STAGE, done, len(mine))
        if not path.is_file():  # otherwise, another machine was faster
            write_array(path, tasks[path](path))
    reporter.update(CACHING_STAGE, len(mine), len(mine))
    processes.barrier()


class _Build:
    """Computes the files of a cache; each method gets the path of the file, which has the number of its shard."""

    def __init__(
        self, folder: Path, manifest: CacheManifest, teacher: Teacher, pairs: Pairs, *, workers: int, max_bad: float
    ) -> None:
        self._folder, self._manifest, self._teacher, self._pairs = folder, manifest, teacher, pairs
        self._workers = workers
        self._dataset = ViewDataset(
            pairs,
            teacher.clip.preprocessing,
            None,
            crops=manifest.crops,
            seed=manifest.seed,
            views=manifest.views,
            max_bad=max_bad,
            substitute=False,
        )

    def caption_keys(self, path: Path) -> npt.NDArray[np.void]:
        """Return the keys of all captions of a shard's pairs, and the number of the pair of each."""
        entries = [
            (caption_key(caption), index)
            for index in _shard_rows(_shard_number(path), len(self._pairs))
            for caption in self._captions(index)
        ]
        return np.asarray(entries, dtype=[("key", KEY), ("pair", "<i8")])

    def merge_captions(self, path: Path) -> None:
        """Write the keys of all different captions, sorted, and beside them a pair that has each."""
        shards = range(shard_count(len(self._pairs)))
        entries = np.concatenate([load_array(caption_shard(self._folder, shard)) for shard in shards])
        keys, first = np.unique(entries["key"], return_index=True)
        write_array(path.with_name("pairs.npy"), entries["pair"][first])
        write_array(path, keys)

    def texts(self, path: Path) -> HalfArray:
        """Embed the captions of a shard of keys; rows of zeros for those that cannot be read."""
        keys = load_array(path.with_name("keys.npy"), memory_mapped=True)
        pairs = load_array(path.with_name("pairs.npy"), memory_mapped=True)
        rows = _shard_rows(_shard_number(path), len(keys))
        part = slice(rows.start, rows.stop)
        captions: dict[int, str] = {}  # by row in the shard
        for row, (key, pair) in enumerate(zip(keys[part].tolist(), pairs[part].tolist(), strict=True)):
            for caption in self._captions(pair):
                if caption_key(caption) == key:
                    captions[row] = caption
        embeddings = self._empty(rows)
        readable = list(captions)
        for batch in in_batches(len(readable), BATCH_SIZE):
            texts = [captions[row] for row in readable[batch]]
            embeddings[readable[batch]] = _to_half(self._teacher.embed_captions(texts))
        return embeddings

    def images(self, path: Path) -> HalfArray:
        """Embed the images of a shard's pairs in a view; rows of zeros for those that cannot be read."""
        view = int(path.parent.name.removeprefix("view-"))
        rows = _shard_rows(_shard_number(path), len(self._pairs))
        embeddings = self._empty(rows)
        # What cannot be read is tried once more: most errors of networks and disks pass.
        bad = self._embed_images(view, rows, embeddings, workers=self._workers)
        if bad:
            bad = self._embed_images(view, sorted(bad), embeddings, workers=0)
        self._dataset.bad.add(bad.items())
        return embeddings

    def _embed_images(
        self, view: int, indices: Sequence[int], embeddings: HalfArray, *, workers: int
    ) -> dict[int, str]:
        """Fill the rows of these pairs; return those that cannot be read, with the reasons."""
        bad: dict[int, str] = {}
        parts = [indices[part] for part in in_batches(len(indices), BATCH_SIZE)]
        views: list[list[View]] = [[(view, index) for index in part] for part in parts]
        for part, batch in zip(parts, step_loader(self._dataset, views, workers=workers), strict=True):
            bad |= dict(batch.bad)
            rows = _to_half(self._teacher.embed_images(batch.student_pixels))
            readable = [position for position, index in enumerate(part) if index not in bad]
            embeddings[[part[position] % SHARD_SIZE for position in readable]] = rows[readable]
        return bad

    def _captions(self, index: int) -> tuple[str, ...]:
        """Return a pair's captions, none if they cannot be read."""
        for _ in range(2):
            with contextlib.suppress(InputError):
                return self._pairs.captions(index)
        return ()

    def _empty(self, rows: range) -> HalfArray:
        return np.zeros((len(rows), self._manifest.embedding_size), dtype="<f2")


def _shard_number(path: Path) -> int:
    return int(path.stem.removeprefix("shard-"))


def _to_half(embeddings: Tensor) -> HalfArray:
    half: HalfArray = embeddings.float().cpu().numpy().astype("<f2")
    return half


def teacher_fingerprint(clip: ClipModel) -> str:
    """Return a SHA-256 of all that a teacher computes with, independent of the files it was loaded from.

    That is its weights in the order of their names, its configuration (such as the activation function), and its
    tokenizer, by the ids of a text.
    """
    digest = hashlib.sha256(json.dumps(_without_locations(clip.model_cfg), sort_keys=True, default=str).encode())
    digest.update(np.asarray(clip.tokenizer([_PROBE])).tobytes())
    for name, tensor in sorted(clip.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


_PROBE = "A photo of two Cats, 42 dogs & a naïve zebra."
_LOCATIONS = ("hf_model_name", "hf_tokenizer_name")  # often the path of a folder


def _without_locations(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_locations(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _LOCATIONS
    }
