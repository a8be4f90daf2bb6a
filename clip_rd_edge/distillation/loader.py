"""Batches that depend only on seed and step: after a resume, or on another machine, a run sees the same data."""

from __future__ import annotations

import math
import os
import re
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import spawn
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from clip_rd_edge.bundle.images import open_to_crop
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.data.order import View
from clip_rd_edge.data.samples import MAX_BAD_SHARE, BadPair, BadSamples, Samples, read_twice
from clip_rd_edge.distillation.pixels import Crops, Levels, crop_levels
from clip_rd_edge.distillation.processes import obey_only_the_parent, stop_signals_blocked
from clip_rd_edge.distillation.store import HalfArray, TeacherStores
from clip_rd_edge.errors import ClipRdEdgeError, InputError, LostProcessError, UnreachableError
from clip_rd_edge.utils.files import machine_failure
from clip_rd_edge.utils.host import cpu_quota, memory_bytes, memory_limit, return_freed_memory, usable_cores
from clip_rd_edge.utils.process import SharedBlock

_ENDED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed|exited unexpectedly)")
# Semaphores, with which the workers begin, lie in shared memory, too.
_WITHOUT_SHARED_MEMORY = (
    "load without processes: {workers} 0, or give the container more shared memory: docker's shm-size is 64 MB by "
    "default"
)
_MUCH, _STEPS, _SECONDS = 0.1, 16, 5.0  # the share of waiting that calls for more workers, and how long it is measured
_WORKER_BYTES = 512 << 20  # of a worker that decodes a large photograph
_NO_PIXELS: Levels = np.zeros((0, 0, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Batch:
    """A batch of B images and B captions.

    Attributes:
        student_pixels, teacher_pixels: the same crops in the size of the student and of each teacher that needs pixels,
            (B, 3, H, W) uint8 in channels-last format, for `pixels.Normaliser`; models of one size share a tensor. For
            texts alone, height and width are 0.
        bad: pairs that could not be read; other pairs took their places.
        teacher_embeddings: image and text embeddings of all teachers from a store, (B, Σ D_k) float16 each, where those
            of each teacher are unit vectors.
        paired: which of the captions belong to the image of their row; None if the data set has nothing but pairs.
        student_ids, teacher_ids: the captions' token ids for the student and for each teacher that embeds captions,
            (B, T), as far as `ViewDataset.tokenizers` has their tokenizers.
    """

    student_pixels: Tensor
    teacher_pixels: tuple[Tensor, ...]
    captions: list[str]
    bad: tuple[BadPair, ...] = ()
    teacher_embeddings: tuple[Tensor, Tensor] | None = None
    paired: tuple[bool, ...] | None = None
    student_ids: Tensor | None = None
    teacher_ids: tuple[Tensor, ...] = ()

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to a GPU do not block; torch's loader calls it."""
        distinct = {id(pixels): pixels for pixels in (self.student_pixels, *self.teacher_pixels)}
        pinned = {key: pixels.pin_memory() for key, pixels in distinct.items()}
        embeddings = self.teacher_embeddings
        return replace(
            self,
            student_pixels=pinned[id(self.student_pixels)],
            teacher_pixels=tuple(pinned[id(pixels)] for pixels in self.teacher_pixels),
            teacher_embeddings=embeddings and (embeddings[0].pin_memory(), embeddings[1].pin_memory()),
        )


class PairView(NamedTuple):
    """One row of a `Batch`: pixel values for student and teachers, (H, W, 3) each, and the pairs that were bad."""

    student_pixels: Levels
    teacher_pixels: tuple[Levels, ...]
    caption: str
    bad: tuple[BadPair, ...] = ()
    teacher_embeddings: tuple[HalfArray, HalfArray] | None = None
    paired: bool | None = None


class ViewDataset(Dataset[PairView]):
    """Views of pairs: one crop of the image and one of its captions, determined by (seed, epoch, index).

    Args:
        student, teachers: the models' preprocessing, of those teachers that need pixels.
        views: number of distinct views of a pair, over which the epochs cycle; 0 draws a new one every epoch.
        max_bad: max share of bad samples.
        substitute: whether the next valid pair takes the place of one that is bad. Otherwise the place of a bad pair is
            filled with zeros, and `bad` of the batch names it.

    Attributes:
        store: the teacher's embeddings of these views, or None. A pair that it lacks is bad.
        min_edge: see `Crops.min_edge`; of the models that are given here, unless others are trained with them.
        tokenizers: of the student, and of each teacher that embeds captions, for the ids of a batch; none for no ids.
        bad: counts bad samples; with `substitute`, `step_loader` adds those it encounters.
    """

    def __init__(
        self,
        pairs: Samples,
        student: Preprocessing,
        teachers: Sequence[Preprocessing],
        *,
        crops: Crops,
        seed: int,
        views: int = 0,
        max_bad: float = MAX_BAD_SHARE,
        substitute: bool = True,
    ) -> None:
        self.store: TeacherStores | None = None
        self.tokenizers: tuple[Callable[[list[str]], Tensor], ...] = ()
        self.views = views
        self.bad = BadSamples(pairs, max_share=max_bad)
        self.pairs, self.student, self.teachers = pairs, student, tuple(teachers)
        self.crops, self.seed, self.substitute = crops, seed, substitute
        self.min_edge = crops.min_edge((student, *teachers))

    def __getitem__(self, view: View) -> PairView:
        if self.views:
            view = view._replace(epoch=view.epoch % self.views)

        def read(index: int) -> PairView:
            return self._read(view._replace(sample=index))

        pair: PairView | None
        if self.substitute:
            pair, bad = self.bad.next_valid(view.sample, read)
        else:
            try:
                pair, bad = read_twice(read, view.sample), ()
            except InputError as error:
                pair, bad = None, ((view.sample, str(error)),)
        if pair is None:  # `step_loader` reports the bad pairs
            student, *teachers = (np.zeros((*m.size, 3), dtype=np.uint8) for m in (self.student, *self.teachers))
            pair = PairView(student, tuple(teachers), "")
        return pair._replace(bad=bad)

    def _read(self, view: View) -> PairView:
        epoch, index, step = view
        # Everything depends on the pair that is read, also where it takes the place of another one: its view is then
        # the same as in its own place, and so is the teacher's embedding of it.
        rng = np.random.default_rng((self.seed, epoch, index))
        sample = self.pairs.read(index)
        # All samples of a step have the same prompt, so that two images of one class have one caption.
        chooser = np.random.default_rng((self.seed, step)) if self.pairs.counts.classes else rng
        caption = sample.captions[int(chooser.integers(len(sample.captions)))]
        embeddings = None
        if self.store is not None and (embeddings := self.store.lookup(epoch, index, caption)) is None:
            raise InputError(f"Pair {index:,} is not in the teacher's store: it was bad when the store was built.")
        if sample.file is None:
            return PairView(_NO_PIXELS, (_NO_PIXELS,) * len(self.teachers), caption, paired=False)
        try:
            image, box = open_to_crop(sample.file, partial(self.crops.draw, rng=rng), min_edge=self.min_edge)
            student, *teachers = crop_levels(image, box, [self.student, *self.teachers])
        except MemoryError as error:
            raise InputError(f"There is not enough memory for the image of pair {index:,}.") from error
        paired = sample.paired if self.pairs.counts.is_mixed else None
        return PairView(student, tuple(teachers), caption, teacher_embeddings=embeddings, paired=paired)


def step_loader(
    dataset: ViewDataset,
    sampler: Iterable[list[View]],
    *,
    workers: int = -1,
    note: Callable[[str], object] = lambda text: None,
) -> Iterator[Batch]:
    """Yield the batches of the sampler's steps in order, prefetched by worker processes.

    Args:
        workers: number of worker processes; 0 loads in the training process; -1 begins with half of the usable cores,
            at most 8, and doubles their number while steps wait for batches, up to `most_workers`.
        note: called with a sentence when there will be more workers, and once when steps wait without that.
    """
    steps, count, goes_on = iter(sampler), workers if workers >= 0 else min(8, _cores() // 2), True
    is_told = count == 0

    def until_paused() -> Iterator[list[View]]:
        while not goes_on and (views := next(steps, None)) is not None:
            yield views

    while goes_on:
        goes_on = False
        with closing(_load(dataset, until_paused(), count)) as batches:
            for batch, share in _with_share_of_waiting(batches, skipped=2 * count):
                yield batch
                if is_told or goes_on or share < _MUCH:
                    continue
                said = f"steps wait for data {share:.0%} of the time, with {count} loader process"
                said += "es" * (count > 1)
                more = min(2 * count, most_workers(batch)) if workers < 0 else count
                if more > count:
                    note(f"{said}: there will be {more}")
                    count, goes_on = more, True  # batches that are being loaded are still used
                else:
                    note(f"{said}{'' if workers > 0 else ', as many as this machine has room for'}")
                    is_told = True


def _with_share_of_waiting(batches: Iterable[Batch], *, skipped: int) -> Iterator[tuple[Batch, float]]:
    """Yield each batch with the share of the time that went into waiting for batches.

    It is that of the last _STEPS batches and _SECONDS, when they have just passed; else 0. The `skipped` first ones,
    with which the workers begin, do not count.
    """
    count, waited, since = -skipped, 0.0, time.perf_counter()
    asked = since
    for batch in batches:
        now, share = time.perf_counter(), 0.0
        count, waited = count + 1, waited + now - asked
        if count >= _STEPS and now - since >= _SECONDS:
            share, count = waited / (now - since), 0
        if count == 0:
            waited, since = 0.0, now
        yield batch, share
        asked = time.perf_counter()


def _cores() -> int:
    return int(min(usable_cores(), cpu_quota() or math.inf)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def most_workers(batch: Batch) -> int:
    """Return how many loader processes this machine has room for: one per core but one, within half of the memory."""
    tensors = {id(one): one.nbytes for one in (batch.student_pixels, *batch.teacher_pixels)}
    each = _WORKER_BYTES + 2 * sum(tensors.values())  # a worker is two batches ahead
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    memory = (memory_limit() or memory_bytes()) // 2 // processes // each
    return max(1, min(_cores() - 1, memory))


def _load(dataset: ViewDataset, steps: Iterable[list[View]], workers: int) -> Generator[Batch, None, None]:
    loader: DataLoader[Any] = DataLoader(
        _Batches(dataset),
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_start_worker, os.getpid()),
    )
    with stop_signals_blocked(), _MAIN_MODULE_HIDDEN:  # the workers inherit the signals
        try:
            batches = iter(loader)
        except OSError as error:
            unstarted = f"The loader processes could not be started: {error.strerror or error}."
            raise machine_failure(error) or UnreachableError(unstarted, hint=_WITHOUT_SHARED_MEMORY) from error
    for batch in batches:
        if isinstance(batch, _Failure):
            raise batch.error from RuntimeError(batch.traceback)
        if dataset.substitute:
            dataset.bad.add(batch.bad)
        yield batch


def _start_worker(parent: int, _worker: int) -> None:
    obey_only_the_parent(parent)
    return_freed_memory()  # of large images, which each worker would keep for itself
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # whose threads do not survive the fork


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Within the block, processes that are spawned, or forked by a server, do not import the main module.

    It is the user's script, which would train once more in each worker unless it is guarded by its `__name__`.
    """
    real = spawn.get_preparation_data

    def prepared(name: str) -> dict[str, Any]:
        return {key: value for key, value in real(name).items() if not key.startswith("init_main")}

    untyped: Any = spawn
    untyped.get_preparation_data = prepared
    try:
        yield
    finally:
        untyped.get_preparation_data = real


_MAIN_MODULE_HIDDEN = SharedBlock(_without_main_module)


class _Failure(NamedTuple):
    """An error of our own in a worker process: torch would make it a text, with a traceback and without its hint."""

    error: ClipRdEdgeError
    traceback: str


class _Batches(Dataset[Any]):
    """The batch of a list of views, or a failure in place of one."""

    def __init__(self, dataset: ViewDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, views: list[View]) -> Batch | _Failure:
        try:
            batch = _collate([self._dataset[view] for view in views])
            ids = [_shared(tokenize(batch.captions).numpy()) for tokenize in self._dataset.tokenizers]
            return replace(batch, student_ids=ids[0] if ids else None, teacher_ids=tuple(ids[1:]))
        except ClipRdEdgeError as error:
            return _Failure(error, traceback.format_exc())


def _as_it_is(batch: Any) -> Any:
    return batch


def lost_worker(error: BaseException) -> LostProcessError | None:
    """Return the error of a run one of whose workers has ended, or None if this is another error.

    torch's signal handler raises it wherever the training process happens to be.
    """
    if not (ended := _ENDED.search(str(error))):
        return None
    return LostProcessError(
        f"A loader process (pid {ended[1]}) has ended; if no message is above, it probably ran out of memory.",
        hint="give the machine or container more memory, or use fewer {workers}; resume with the same command and "
        "{resume}",
    )


def _collate(views: list[PairView]) -> Batch:
    stacked: dict[int, Tensor] = {}  # by the array of the first view, which models of one size share
    levels = [(view.student_pixels, *view.teacher_pixels) for view in views]
    for number, first in enumerate(levels[0]):
        if id(first) not in stacked:
            stacked[id(first)] = _shared(np.stack([own[number] for own in levels])).permute(0, 3, 1, 2)
    student, *teachers = (stacked[id(first)] for first in levels[0])
    embeddings = [view.teacher_embeddings for view in views if view.teacher_embeddings is not None]
    image, text = zip(*embeddings, strict=True) if embeddings else ((), ())
    return Batch(
        student,
        tuple(teachers),
        [view.caption for view in views],
        tuple(bad for view in views for bad in view.bad),
        (_shared(np.stack(image)), _shared(np.stack(text))) if embeddings else None,
        tuple(view.paired for view in views if view.paired is not None) or None,
    )


def _shared(array: npt.NDArray[Any]) -> Tensor:
    """Return a tensor, in shared memory in a worker process.

    torch would move it there in a thread that prints an error and drops the batch, which the training process would
    wait for without end.
    """
    tensor = torch.from_numpy(array)
    if get_worker_info() is None:
        return tensor
    untyped: Any = tensor  # torch has no types for it
    try:
        untyped.share_memory_()
    except RuntimeError as error:
        raise UnreachableError(
            f"A worker process could not pass a batch of {tensor.nbytes / 1e6:.1f} MB through shared memory: "
            f"{str(error).splitlines()[0].rpartition(': ')[2]}.",
            hint=_WITHOUT_SHARED_MEMORY,
        ) from error
    return tensor
