"""Compute the files of a teacher's store, by this process, by those of a run, or by a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby, tee
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clip_rd_edge.bundle.encoder import in_batches
from clip_rd_edge.data.samples import BadPair, BadSamples, Samples, fingerprint, read_twice, require_images
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.inputs import RunSetup, make_dataset, training_pairs
from clip_rd_edge.distillation.loader import HalfArray, View, ViewDataset, step_loader
from clip_rd_edge.distillation.pixels import Crops
from clip_rd_edge.distillation.processes import Processes, join_processes
from clip_rd_edge.distillation.step import AUTOCAST, caption_batch
from clip_rd_edge.distillation.store import (
    COMPLETE,
    KEY,
    MANIFEST,
    CompleteStore,
    StoreManifest,
    caption_key,
    caption_shard,
    claim_store,
    embedding_file,
    image_shard,
    is_embedding,
    keys_crc32,
    keys_file,
    open_store,
    open_stores,
    shard_count,
    shard_rows,
    store_folders,
    text_shard,
    with_checksums,
    write_array,
)
from clip_rd_edge.distillation.student import crops_of, require_named_student
from clip_rd_edge.distillation.teacher import (
    BatchTeacher,
    ChoosingTeacher,
    LiveTeacher,
    StoredTeacher,
    Teacher,
    caption_batch_size,
    load_models_to_embed_with,
    teacher_weights,
    texts_to_choose_from,
)
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.models.clip import ClipModel, default_device, float32_on_cpu, model_fingerprint
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.utils.arrays import load_array
from clip_rd_edge.utils.cluster import map_on_cluster
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.paths import is_file
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import read_json, to_json

BATCH_SIZE = 64
STORE_STAGE = "storing the teacher's embeddings (shards)"  # name of the stage in progress reports


def make_manifest(
    teacher: ClipModel, pairs: Samples, *, crops: Crops, seed: int, views: int, precision: str
) -> StoreManifest:
    """Return the manifest of a cache of this teacher over these pairs."""
    return StoreManifest(
        teacher=teacher.name,
        teacher_sha256=model_fingerprint(teacher),
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


class ShardTask(NamedTuple):
    """A file of a store to compute.

    Attributes:
        rows: of all pairs, or of all captions, those in the file.
        keys, pairs: of the captions of a text shard, (n,): its part of keys.npy and pairs.npy.
    """

    kind: Literal["captions", "texts", "images"]
    shard: int
    rows: range
    view: int = 0
    keys: npt.NDArray[Any] | None = None
    pairs: npt.NDArray[Any] | None = None

    def path(self, folder: Path) -> Path:
        """Return the path of the file."""
        if self.kind == "images":
            return image_shard(folder, self.view, self.shard)
        return (caption_shard if self.kind == "captions" else text_shard)(folder, self.shard)

    def is_done(self, folder: Path, *, width: int) -> bool:
        """Return whether the file is there and, if it holds embeddings, (width,) each, as long as its rows."""
        path = self.path(folder)
        return path.is_file() if self.kind == "captions" else embedding_file(path, self.rows, width=width).is_whole()

    def with_captions(self, folder: Path) -> ShardTask:
        """Return the task with what it needs of the store's other files."""
        if self.kind != "texts":
            return self
        keys, pairs = (load_array(folder / "texts" / f"{name}.npy", memory_mapped=True) for name in ("keys", "pairs"))
        part = slice(self.rows.start, self.rows.stop)
        return self._replace(keys=np.array(keys[part]), pairs=np.array(pairs[part]))


class Shard(NamedTuple):
    """The content of a file, and the pairs that could not be read for it."""

    rows: npt.NDArray[Any]
    bad: tuple[BadPair, ...] = ()


# Computes tasks, in any order, by whoever.
Compute = Callable[[Iterable[ShardTask]], Iterator[tuple[ShardTask, Shard]]]


def build_store(
    folder: Path,
    maker: ShardMaker,
    processes: Processes,
    *,
    compute: Compute | None = None,
    reporter: Reporter = SILENT,
) -> None:
    """Compute what is missing or cut off in `folder`; each process computes its share of the shards.

    Args:
        compute: computes the shards; None for `maker`, in each process.
        reporter: receives the number of completed shards.
    """
    manifest = maker.manifest
    processes.on_main(lambda: claim_store(folder, manifest))
    with processes.together():
        complete = _is_complete(folder, manifest, processes)
    if processes.sum(int(complete))[0] == processes.world_size:
        return
    processes.on_main(lambda: _reopen(folder))
    bad = BadSamples(maker.pairs, max_share=maker.max_bad)

    def is_done(task: ShardTask) -> bool:
        return task.is_done(folder, width=manifest.embedding_size)

    def write(tasks: Sequence[ShardTask], lacking: Sequence[Path] = ()) -> None:
        # Another job may write files meanwhile, so that one process lists them for all; or remove those that it wrote,
        # if it is refused.
        while missing := processes.on_main(lambda: [task for task in tasks if not is_done(task)]):
            mine = missing[processes.rank :: processes.world_size]
            left = (task.with_captions(folder) for task in mine if not is_done(task))
            with_bad = list(lacking)
            reporter.update(STORE_STAGE, 0, len(mine))
            for done, (task, shard) in enumerate((compute or maker.compute)(left), start=1):
                try:
                    bad.add(shard.bad)
                except InputError:  # too many already, for which all processes are refused below
                    break
                record_bad(task.path(folder), shard.bad)
                write_array(task.path(folder), shard.rows if task.kind == "captions" else with_checksums(shard.rows))
                with_bad += [task.path(folder)] * bool(shard.bad)
                reporter.update(STORE_STAGE, done, len(mine))
            share_bad(bad, processes, with_bad)

    shards = [(shard, shard_rows(shard, len(maker.pairs))) for shard in range(shard_count(len(maker.pairs)))]
    write([ShardTask("captions", shard, rows) for shard, rows in shards])
    keys = keys_file(folder)
    if processes.is_main and not (_is_array(keys) and _is_array(keys.with_name("pairs.npy"))):
        _merge_captions(folder, keys, len(shards))
    processes.barrier()
    captions = len(load_array(keys, memory_mapped=True))
    write([ShardTask("texts", shard, shard_rows(shard, captions)) for shard in range(shard_count(captions))])
    images = [ShardTask("images", shard, rows, view) for view in range(manifest.views) for shard, rows in shards]
    lacking = count_recorded(bad, [task.path(folder) for task in images], processes)
    write(images, lacking)
    if processes.is_main:
        write_bytes(folder / COMPLETE, to_json(CompleteStore(captions, keys_crc32(folder))))
    if bad.summary:
        reporter.say(bad.summary)
    processes.barrier()


def share_bad(bad: BadSamples, processes: Processes, files: Iterable[Path]) -> None:
    """Wait for all processes, and count their bad pairs together.

    A process that has too many of its own stops there and refuses here, so that the others remove their files, too.

    Args:
        files: those that this process wrote without some bad pairs. They are removed if the bad pairs of all processes
            are too many: the next attempt would take them for complete, and count nothing.
    """
    try:
        bad.share(processes.gather_objects)
    except InputError:
        for path in files:
            path.unlink(missing_ok=True)  # another job that wrote it, too, may have removed it
            _bad_file(path).unlink(missing_ok=True)
        raise


class _LeftOut(msgspec.Struct, frozen=True):
    """Pairs that a file of a store lacks, with the reasons."""

    pairs: tuple[BadPair, ...]


def record_bad(path: Path, bad: Sequence[BadPair]) -> None:
    """Write the pairs that a file of a store lacks beside it, before it is written: later calls count them, too."""
    if bad:
        write_bytes(_bad_file(path), to_json(_LeftOut(tuple(bad))))
    else:
        _bad_file(path).unlink(missing_ok=True)


def count_recorded(bad: BadSamples, files: Sequence[Path], processes: Processes) -> list[Path]:
    """Count the pairs that those of the files lack which earlier calls wrote; return these files."""

    def recorded() -> list[tuple[Path, tuple[BadPair, ...]]]:
        lacking = [path for path in files if is_file(_bad_file(path)) and is_file(path)]
        return [(path, read_json(_bad_file(path), _LeftOut).pairs) for path in lacking]

    found = processes.on_main(recorded)
    lacking = [path for path, _ in found]
    with contextlib.suppress(InputError):  # too many, for which all processes are refused below
        bad.add(pair for _, pairs in found for pair in pairs)
    share_bad(bad, processes, lacking)
    return lacking


def _bad_file(path: Path) -> Path:
    return path.with_suffix(".bad.json")


def _is_complete(folder: Path, manifest: StoreManifest, processes: Processes) -> bool:
    """Return whether a cache is complete, for a process that sees what the main one has claimed."""
    if not processes.is_main and not is_file(folder / MANIFEST):
        raise UsageError(
            f"The teacher's store {folder} is not on a file system that the machines share.",
            hint="choose another {store}, or copy a complete one to each machine",
        )
    claim_store(folder, manifest)
    try:
        open_store(folder)
    except ConfigError:  # also a cache that lost a file, or a part of one, after it was complete
        return False
    return True


def _reopen(folder: Path) -> None:
    """Make a complete cache an incomplete one, without its keys if they are damaged."""
    with contextlib.suppress(ConfigError, InputError, OSError):
        if read_json(folder / COMPLETE, CompleteStore).keys_crc32 != keys_crc32(folder):
            keys_file(folder).unlink()
    (folder / COMPLETE).unlink(missing_ok=True)


def _is_array(path: Path) -> bool:
    try:
        load_array(path, memory_mapped=True)
    except (OSError, ValueError, EOFError):
        return False
    return True


def _merge_captions(folder: Path, path: Path, shards: int) -> None:
    """Write the keys of all different captions, sorted, and beside them a pair that has each.

    Embeddings of texts are there only if the keys were lost, and those to which their rows belong may have been others.
    """
    for texts in path.parent.glob("shard-*.npy"):
        texts.unlink()
    entries = np.concatenate([load_array(caption_shard(folder, shard)) for shard in range(shards)])
    keys, first = np.unique(entries["key"], return_index=True)
    write_array(path.with_name("pairs.npy"), entries["pair"][first])
    write_array(path, keys)


class ShardMaker:
    """Computes the files of a store.

    Args:
        workers: loader processes; see `step_loader`.
        max_bad: max fraction of the samples that may be unreadable.
    """

    def __init__(
        self, manifest: StoreManifest, teacher: Teacher, pairs: Samples, *, workers: int, max_bad: float
    ) -> None:
        self.manifest, self.pairs, self.max_bad = manifest, pairs, max_bad
        self._teacher, self._workers = teacher, workers
        self._data_set: ViewDataset | None = None

    def compute(self, tasks: Iterable[ShardTask]) -> Iterator[tuple[ShardTask, Shard]]:
        """Compute tasks in turn in this process."""
        for kind, of_kind in groupby(tasks, key=lambda task: task.kind):
            if kind == "images":
                yield from self._images(of_kind)
            else:
                yield from ((task, self(task)) for task in of_kind)

    def __call__(self, task: ShardTask) -> Shard:
        """Compute a task."""
        if task.kind == "captions":
            return Shard(self._caption_keys(task.rows))
        if task.kind == "texts":
            assert task.keys is not None
            assert task.pairs is not None
            return Shard(self._texts(task.keys, task.pairs))
        ((_, shard),) = self._images([task])
        return shard

    def _caption_keys(self, rows: range) -> npt.NDArray[np.void]:
        """Return the keys of all captions of pairs, and the number of the pair of each."""
        entries = [(caption_key(caption), index) for index in rows for caption in self._captions(index)]
        return np.asarray(entries, dtype=[("key", KEY), ("pair", "<i8")])

    def _texts(self, keys: npt.NDArray[Any], pairs: npt.NDArray[Any]) -> HalfArray:
        """Embed captions by their keys; rows of zeros for those that cannot be read or embedded."""
        captions: dict[int, str] = {}  # by row
        for row, (key, pair) in enumerate(zip(keys.tolist(), pairs.tolist(), strict=True)):
            for caption in self._captions(pair):
                if caption_key(caption) == key:
                    captions[row] = caption
        embeddings = self._empty(len(keys))
        readable = list(captions)
        for batch in in_batches(len(readable), BATCH_SIZE):
            texts = [captions[row] for row in readable[batch]]
            embeddings[readable[batch]] = _to_half(self._teacher.embed_captions(texts))
        return embeddings

    def _images(self, tasks: Iterable[ShardTask]) -> Iterator[tuple[ShardTask, Shard]]:
        """Embed the images of pairs in views; rows of zeros for those that cannot be read or embedded.

        One loader reads for all tasks: its processes start once, and are ahead where one task ends and another begins.
        """
        parts = ((task, task.rows[part]) for task in tasks for part in in_batches(len(task.rows), BATCH_SIZE))
        embeddings, bad = self._empty(0), dict[int, str]()
        for task, indices, rows, bad_ones in self._embed(parts, workers=self._workers):
            if indices[0] == task.rows.start:
                embeddings, bad = self._empty(len(task.rows)), {}
            embeddings[np.subtract(indices, task.rows.start)] = rows
            bad |= bad_ones
            if indices[-1] + 1 == task.rows.stop:
                bad = self._try_again(task, embeddings, bad) if bad else bad
                yield task, Shard(embeddings, tuple(bad.items()))

    def _try_again(self, task: ShardTask, embeddings: HalfArray, bad: Iterable[int]) -> dict[int, str]:
        """Embed these pairs of a task once more: most errors of networks and disks pass. Return those still bad."""
        indices, still_bad = sorted(bad), dict[int, str]()
        parts = ((task, indices[part]) for part in in_batches(len(indices), BATCH_SIZE))
        for _, again, rows, bad_ones in self._embed(parts, workers=0):
            embeddings[np.subtract(again, task.rows.start)] = rows
            still_bad |= bad_ones
        return still_bad

    def _embed(
        self, parts: Iterable[tuple[ShardTask, Sequence[int]]], *, workers: int
    ) -> Iterator[tuple[ShardTask, Sequence[int], HalfArray, dict[int, str]]]:
        """Embed parts of shards, of some pairs each, which one loader reads.

        Yields each part with its rows, and with those pairs that cannot be read or embedded, and why. Their rows are
        zeros.
        """
        asked, parts = tee(parts)  # the loader is ahead
        views = ([View(task.view, index) for index in indices] for task, indices in asked)
        for batch, (task, indices) in zip(step_loader(self._views(), views, workers=workers), parts, strict=True):
            bad, rows = dict(batch.bad), _to_half(self._teacher.embed_images(batch.student_pixels))
            for index, row in zip(indices, rows, strict=True):
                if index in bad:
                    row[:] = 0
                elif not is_embedding(row):
                    bad[index] = (
                        f"The teacher's embedding of image {index:,} is not finite in {self.manifest.precision}."
                    )
            yield task, indices, rows, bad

    def _views(self) -> ViewDataset:
        if self._data_set is None:
            self._data_set = ViewDataset(
                self.pairs,
                self._teacher.clip.preprocessing,
                [],
                crops=self.manifest.crops,
                seed=self.manifest.seed,
                views=self.manifest.views,
                max_bad=self.max_bad,
                substitute=False,
            )
        return self._data_set

    def _captions(self, index: int) -> tuple[str, ...]:
        """Return a pair's captions, none if they cannot be read."""
        with contextlib.suppress(InputError):
            return read_twice(self.pairs.read, index).captions
        return ()

    def _empty(self, rows: int) -> HalfArray:
        return np.zeros((rows, self.manifest.embedding_size), dtype="<f2")


def shard_maker(config: RunConfig, teacher: Teacher, pairs: Samples, crops: Crops) -> ShardMaker:
    """Return what computes the store of a run's teacher over its pairs; `teacher_precision` is not `auto` any more."""
    manifest = make_manifest(
        teacher.clip, pairs, crops=crops, seed=config.seed, views=config.views, precision=config.teacher_precision
    )
    return ShardMaker(manifest, teacher, pairs, workers=config.workers, max_bad=config.max_bad)


def _to_half(embeddings: Tensor) -> HalfArray:
    """Return rows of a store: zeros for embeddings that are not finite, as where a teacher overflows in float16."""
    half: HalfArray = embeddings.float().cpu().numpy().astype("<f2")
    half[~is_embedding(half)] = 0
    return half


def prepare_teacher(
    config: RunConfig, setup: RunSetup, processes: Processes, reporter: Reporter
) -> tuple[BatchTeacher | None, ViewDataset]:
    """Return the teacher, live or from a cache that is built first, and the data set that provides its inputs."""
    if setup.ensemble is None:
        return None, make_dataset(config, setup)
    if setup.stored is not None:
        return StoredTeacher(setup.ensemble, processes.device), make_dataset(config, setup)
    teachers = make_teachers(config, setup, processes.device, AUTOCAST[config.teacher_precision])
    live = LiveTeacher(teachers)
    teacher: BatchTeacher = live
    dataset = make_dataset(config, setup, with_teacher_pixels=config.store is None)
    if config.store is not None:
        with processes.together():
            folders = store_folders(Path(config.store), setup.teachers)
        for folder, one in zip(folders, teachers, strict=True):
            build_store(folder, shard_maker(config, one, setup.pairs, dataset.crops), processes, reporter=reporter)
        dataset.cache = open_stores(folders)
        teacher = StoredTeacher(setup.ensemble, processes.device)
    with processes.together():
        texts = texts_to_choose_from(config, setup.pairs)
    if texts:
        reporter.say(f"the teacher chooses among {len(texts):,} texts for each image without a caption")
        teacher = ChoosingTeacher(teacher, texts, live.embed_captions, reporter=reporter)
    if config.store is not None:
        for one in teachers:
            one.clip.model.to("cpu")
    return teacher, dataset


def make_teachers(
    config: RunConfig, setup: RunSetup, device: torch.device, autocast: torch.dtype | None
) -> list[Teacher]:
    """Return the teachers of a run, on a device and in a precision."""
    captions = caption_batch(config, device)
    return [Teacher(clip, device, autocast=autocast, caption_batch=captions) for clip in setup.teachers]


@float32_on_cpu()
def embed_teacher(config: RunConfig, folder: Path, *, cluster: str | None = None, reporter: Reporter = SILENT) -> None:
    """Compute what is missing in the store `folder`, for runs with this configuration's teachers, pairs and crops.

    Args:
        config: its `views` are those of the store, its `teacher_precision` is not `auto`.
        cluster: address of a Ray cluster, whose workers compute the shards; this process writes them.
        reporter: receives the number of completed shards.
    """
    with join_processes() as processes:
        shown = reporter if processes.is_main else SILENT
        with processes.main_first():
            require_named_student(config)
            pairs = training_pairs(config, reporter=shown)
            require_images(pairs)
        with processes.together():
            teachers = load_models_to_embed_with(config)
            folders = store_folders(folder, teachers)
        for number, (clip, its_folder) in enumerate(zip(teachers, folders, strict=True)):
            with processes.together():
                maker = _maker(config, clip, pairs)
            compute = partial(_on_cluster, cluster, config, number, maker.manifest) if cluster else None
            build_store(its_folder, maker, processes, compute=compute, reporter=shown)
            clip.model.to("cpu")


def _maker(config: RunConfig, clip: ClipModel, pairs: Samples) -> ShardMaker:
    device = default_device()
    autocast, captions = AUTOCAST[config.teacher_precision], caption_batch_size(BATCH_SIZE, device)
    teacher = Teacher(clip, device, autocast=autocast, caption_batch=captions)
    return shard_maker(config, teacher, pairs, crops_of(config))


def _on_cluster(
    address: str, config: RunConfig, number: int, manifest: StoreManifest, tasks: Iterable[ShardTask]
) -> Iterator[tuple[ShardTask, Shard]]:
    tasks = list(tasks)
    yield from zip(tasks, map_on_cluster(address, partial(_make_worker, config, number, manifest), tasks), strict=True)


def _make_worker(config: RunConfig, number: int, manifest: StoreManifest) -> ShardMaker:
    """Return what computes shards of a teacher in a worker, whose data and teacher must be those of the store."""
    name = config.teachers[number]
    clip = load_clip(name, pretrained=teacher_weights(config, name))
    maker = _maker(config, clip, training_pairs(config))
    for field in ("teacher_sha256", "pairs_sha256"):
        if getattr(maker.manifest, field) != getattr(manifest, field):
            what = "teacher" if field == "teacher_sha256" else "data"
            raise InputError(f"The {what} here is not that of the store.", hint="give all machines the same files")
    return maker
