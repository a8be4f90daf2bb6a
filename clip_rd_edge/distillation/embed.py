"""Fill a teacher's store, for a run or for many: by this process, by those of torchrun, or by a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clip_rd_edge.bundle.encoder import in_batches
from clip_rd_edge.data.order import View
from clip_rd_edge.data.samples import BadPair, BadSamples, Samples, fingerprint, read_twice, require_images
from clip_rd_edge.distillation import store
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.loader import ViewDataset, step_loader
from clip_rd_edge.distillation.pixels import Crops
from clip_rd_edge.distillation.processes import Processes, join_processes
from clip_rd_edge.distillation.setup import RunSetup, make_dataset, training_pairs
from clip_rd_edge.distillation.step import AUTOCAST, caption_batch
from clip_rd_edge.distillation.store import HalfArray, RowFile, StoreManifest
from clip_rd_edge.distillation.student import crops_of, require_named_student
from clip_rd_edge.distillation.teacher import (
    BatchTeacher,
    ChoosingTeacher,
    LiveTeacher,
    StoredTeacher,
    Teacher,
    caption_batch_size,
    load_teachers,
    refuse_idle_teacher,
    teacher_weights,
    texts_to_choose_from,
)
from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.losses.terms import load_terms
from clip_rd_edge.models.clip import ClipModel, default_device, float32_on_cpu, model_fingerprint
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.paths import is_file
from clip_rd_edge.utils.structs import to_json
from clip_rd_edge.utils.text import SILENT, Reporter

BATCH_SIZE = 64
STORE_STAGE = "storing the teacher's embeddings (shards)"  # name of the stage in progress reports


def prepare_teacher(
    config: RunConfig, setup: RunSetup, processes: Processes, reporter: Reporter
) -> tuple[BatchTeacher | None, ViewDataset]:
    """Return the teacher, live or from a store that is filled first, and the data set that provides its inputs."""
    if setup.ensemble is None:
        return None, make_dataset(config, setup)
    if setup.stored is not None:
        return StoredTeacher(setup.ensemble, processes.device), make_dataset(config, setup)
    teachers = make_teachers(config, setup, processes.device, AUTOCAST[config.teacher_precision])
    live = LiveTeacher(teachers)
    teacher: LiveTeacher | StoredTeacher = live
    dataset = make_dataset(config, setup, with_teacher_pixels=config.store is None)
    if config.store is not None:
        with processes.together():
            folders = store.store_folders(Path(config.store), setup.teachers)
        for folder, one in zip(folders, teachers, strict=True):
            maker = ShardMaker(config, one, setup.pairs, dataset.crops)
            fill_store(folder, maker, processes, max_bad=config.max_bad, reporter=reporter)
        dataset.store = store.open_stores(folders)
        teacher = StoredTeacher(setup.ensemble, processes.device)
    with processes.together():
        texts = texts_to_choose_from(config, setup.pairs)
    chooser: ChoosingTeacher | None = None
    if texts:
        reporter.note(f"the teacher chooses among {len(texts):,} texts for each image without a caption")
        chooser = ChoosingTeacher(teacher, texts, live.embed_captions, reporter=reporter)
    if config.store is not None:
        for clip in setup.teachers:
            clip.model.to("cpu")
    return chooser or teacher, dataset


def make_teachers(
    config: RunConfig, setup: RunSetup, device: torch.device, autocast: torch.dtype | None
) -> list[Teacher]:
    captions = caption_batch(config, device)
    return [Teacher(clip, device, autocast=autocast, caption_batch=captions) for clip in setup.teachers]


@float32_on_cpu()
def embed_teacher(config: RunConfig, folder: Path, *, cluster: str | None = None, reporter: Reporter = SILENT) -> None:
    """Compute what is missing in the store `folder`, for runs with this configuration's teachers, pairs and crops.

    Args:
        config: its `views` are those of the store, its `teacher_precision` is not `auto`.
        cluster: address of a Ray cluster, whose workers compute the shards; this process writes them.
    """
    with join_processes() as processes:
        shown = reporter if processes.is_main else SILENT
        with processes.together():
            require_named_student(config)
            refuse_idle_teacher(config)
        pairs = processes.main_first(lambda: training_pairs(config, reporter=shown))
        with processes.together():
            require_images(pairs)
            teachers = load_teachers(config)
            folders = store.store_folders(folder, teachers)
        for number, (clip, own) in enumerate(zip(teachers, folders, strict=True)):
            with processes.together():
                maker = _maker(config, clip, pairs)
            compute: Compute | None = None
            if cluster:
                from clip_rd_edge.utils.cluster import map_on_cluster  # late: hardly anybody has a cluster

                compute = partial(map_on_cluster, cluster, partial(_make_worker, config, number, maker.manifest))
            fill_store(own, maker, processes, max_bad=config.max_bad, compute=compute, reporter=shown)
            clip.model.to("cpu")


def _maker(config: RunConfig, clip: ClipModel, pairs: Samples) -> ShardMaker:
    device = default_device()
    autocast, captions = AUTOCAST[config.teacher_precision], caption_batch_size(BATCH_SIZE, device)
    return ShardMaker(config, Teacher(clip, device, autocast=autocast, caption_batch=captions), pairs, crops_of(config))


def _make_worker(config: RunConfig, number: int, manifest: StoreManifest) -> Callable[[Task], Shard]:
    """Return what computes shards of a teacher in a worker, whose data and teacher must be those of the store."""
    for source in config.terms:  # which the recipe weighs
        load_terms(source)
    name = config.teachers[number]
    clip = load_clip(name, pretrained=teacher_weights(config, name))
    maker = _maker(config, clip, training_pairs(config))
    if maker.manifest != manifest:
        raise InputError("The teacher or the data differs on this machine.", hint="give all machines the same files")
    return lambda task: next(maker.compute([task]))


class Task(NamedTuple):
    """A file of a store to compute.

    Attributes:
        rows: of all captions, or of all pairs in `view`, those in the file.
        captions: of a file of texts, (n, 2): the key of each caption, and a pair that has it; None for images.
    """

    path: Path
    rows: range
    view: int = 0
    captions: npt.NDArray[np.uint64] | None = None


class Shard(NamedTuple):
    """The content of a file, and the pairs that are bad in it."""

    rows: npt.NDArray[Any]
    bad: tuple[BadPair, ...] = ()


Compute = Callable[[Sequence[Task]], Iterator[Shard]]  # computes tasks of one kind, in their order


class ShardMaker:
    """Computes the files of a store of one teacher over the pairs of a run; `teacher_precision` is not `auto`."""

    def __init__(self, config: RunConfig, teacher: Teacher, pairs: Samples, crops: Crops) -> None:
        self.pairs, self._teacher, self._workers = pairs, teacher, config.workers
        self.manifest = StoreManifest(
            teacher=teacher.clip.name,
            teacher_sha256=model_fingerprint(teacher.clip),
            logit_scale=teacher.logit_scale,
            embedding_size=teacher.clip.embedding_size,
            preprocessing=teacher.clip.preprocessing,
            crops=crops,
            seed=config.seed,
            views=config.views,
            data=pairs.name,
            pairs=len(pairs),
            pairs_sha256=fingerprint(pairs),
            precision=config.teacher_precision,
        )

    def compute(self, tasks: Sequence[Task]) -> Iterator[Shard]:
        """Compute files of images, or of texts, in turn in this process."""
        texts = [task.captions for task in tasks if task.captions is not None]
        yield from (Shard(self._texts(captions)) for captions in texts)
        yield from self._images([task for task in tasks if task.captions is None])

    def captions(self, rows: range) -> npt.NDArray[np.uint64]:
        """Return key and pair of all captions of pairs, (n, 2)."""
        entries = [(store.caption_key(caption), index) for index in rows for caption in self._captions_of(index)]
        return np.array(entries, dtype="<u8").reshape(-1, 2)

    def _texts(self, captions: npt.NDArray[np.uint64]) -> HalfArray:
        """Embed captions by their keys; rows of zeros for those that cannot be read or embedded."""
        texts: dict[int, str] = {}  # by row
        for row, (key, pair) in enumerate(captions.tolist()):
            found = [caption for caption in self._captions_of(pair) if store.caption_key(caption) == key]
            texts.update((row, caption) for caption in found)
        embeddings: HalfArray = np.zeros((len(captions), self.manifest.embedding_size), dtype="<f2")
        readable = list(texts)
        for batch in in_batches(len(readable), BATCH_SIZE):
            rows = readable[batch]
            embeddings[rows] = _to_half(self._teacher.embed_captions([texts[row] for row in rows]))
        return embeddings

    def _images(self, tasks: Sequence[Task]) -> Iterator[Shard]:
        """Embed the images of pairs in views; rows of zeros for those that cannot be read or embedded.

        One loader reads for all tasks: its processes start once, and are ahead where one task ends and another begins.
        """
        manifest, clip = self.manifest, self._teacher.clip
        views = ViewDataset(
            self.pairs, clip.preprocessing, [], crops=manifest.crops, seed=manifest.seed, views=manifest.views,
            max_bad=1, substitute=False,
        )  # fmt: skip

        def parts() -> Iterator[tuple[Task, range]]:
            return ((task, task.rows[part]) for task in tasks for part in in_batches(len(task.rows), BATCH_SIZE))

        batches = step_loader(
            views, ([View(task.view, index) for index in part] for task, part in parts()), workers=self._workers
        )
        rows, bad = list[HalfArray](), dict[int, str]()
        for batch, (task, part) in zip(batches, parts(), strict=True):
            bad.update(batch.bad)
            rows.append(_to_half(self._teacher.embed_images(batch.student_pixels)))
            for index, row in zip(part, rows[-1], strict=True):
                if index in bad:
                    row[:] = 0
                elif not row.any():
                    bad[index] = f"The teacher's embedding of image {index:,} is not finite in {manifest.precision}."
            if part.stop == task.rows.stop:
                yield Shard(np.concatenate(rows), tuple(bad.items()))
                rows, bad = [], {}

    def _captions_of(self, index: int) -> tuple[str, ...]:
        with suppress(InputError):
            return read_twice(self.pairs.read, index).captions
        return ()


def _to_half(embeddings: Tensor) -> HalfArray:
    """Return rows of a store: zeros for embeddings that are not finite, as where a teacher overflows in float16."""
    half: HalfArray = embeddings.float().cpu().numpy().astype("<f2")
    half[~np.isfinite(half).all(axis=1)] = 0
    return half


def fill_store(
    folder: Path,
    maker: ShardMaker,
    processes: Processes,
    *,
    max_bad: float,
    compute: Compute | None = None,
    reporter: Reporter = SILENT,
) -> None:
    """Compute what is missing or cut off in `folder`; each process computes its share of the shards, by `maker`.

    Args:
        compute: computes the shards in place of `maker`.
    """
    manifest = maker.manifest
    with ExitStack() as stack:

        def begin() -> bool:
            if is_file(folder / store.MANIFEST):
                store.require_same_store(folder, manifest)
                with suppress(ConfigError, InputError):  # it was interrupted, or has lost a file, or a part of one
                    store.open_store(folder)
                    return False
            stack.enter_context(store.sole_builder(folder, manifest, reporter))
            return True

        is_begun = processes.on_main(begin)
        with processes.together():
            store.require_same_store(folder, manifest)  # a machine may not see what the first has begun
            if not is_begun:
                store.open_store(folder)
        if not is_begun:
            return
        bad, captions = BadSamples(maker.pairs, max_share=max_bad), _different_captions(maker, processes)
        processes.on_main(lambda: _write_keys(folder, captions[:, :1]))
        texts = [
            Task(store.text_shard(folder, shard), rows, captions=captions[rows.start : rows.stop])
            for shard, rows in enumerate(store.shards(len(captions)))
        ]
        images = [
            Task(store.image_shard(folder, view, shard), rows, view)
            for view in range(manifest.views)
            for shard, rows in enumerate(store.shards(manifest.pairs))
        ]
        for tasks in (texts, images):
            _write_missing(
                tasks, compute or maker.compute, processes, width=manifest.embedding_size, bad=bad, reporter=reporter
            )
        processes.on_main(lambda: write_bytes(folder / store.COMPLETE, to_json(store.CompleteStore(len(captions)))))
        if bad.summary:
            reporter.note(bad.summary)


def _different_captions(maker: ShardMaker, processes: Processes) -> npt.NDArray[np.uint64]:
    """Return the key of each different caption, ascending, and the first pair that has it, (C, 2)."""
    with processes.together():
        own = [maker.captions(rows) for rows in store.shards(len(maker.pairs))[processes.rank :: processes.world_size]]
    entries = np.concatenate(list(chain.from_iterable(processes.gather_objects(own))))
    entries = entries[np.lexsort((entries[:, 1], entries[:, 0]))]
    return entries[np.unique(entries[:, 0], return_index=True)[1]]


def _write_keys(folder: Path, keys: npt.NDArray[np.uint64]) -> None:
    """Write the keys of all captions. If they are not those that are there, embeddings belong to other rows."""
    path, content = store.keys_file(folder), store.rows_with_checksums(keys)
    if not is_file(path) or path.read_bytes() != content:
        for texts in path.parent.glob("shard-*.npy"):
            texts.unlink()
        write_bytes(path, content)


def _write_missing(
    tasks: Sequence[Task], compute: Compute, processes: Processes, *, width: int, bad: BadSamples, reporter: Reporter
) -> None:
    """Compute and write the files that are missing, one in each process at a time; `bad` counts what all have met."""
    rank, count = processes.rank, processes.world_size
    files = [RowFile(task.path, count=len(task.rows), width=width) for task in tasks]
    missing = processes.on_main(lambda: [number for number, file in enumerate(files) if not file.is_whole()])
    own = [tasks[number] for number in missing[rank::count]]
    computed = zip(own, compute(own), strict=True)
    reporter.update(STORE_STAGE, 0, len(missing))
    with_bad = list[Path]()
    for done in range(0, len(missing), count):
        found: tuple[BadPair, ...] = ()
        with processes.together():
            if done + rank < len(missing):
                task, (rows, found) = next(computed)
                store.write_rows(task.path, rows)
                with_bad += [task.path] if found else []
        try:
            bad.add(chain.from_iterable(processes.gather_objects(found)))
        except InputError:  # in all processes; the next attempt would take these files for complete
            for path in with_bad:
                path.unlink()
            raise
        reporter.update(STORE_STAGE, min(done + count, len(missing)), len(missing))
