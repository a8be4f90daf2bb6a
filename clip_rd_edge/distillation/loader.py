"""Batches as a function of seed and step alone: what a run sees is the same after a resume, on any machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clip_rd_edge.contract.preprocess import Box, Preprocessing, preprocess_crop
from clip_rd_edge.data.pairs import MAX_SHARE, Bad, BadSamples, Pairs, SoundPair

if TYPE_CHECKING:
    from clip_rd_edge.distillation.embedding_store import TeacherCache

Half = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Batch:
    """B pairs: pixels for the student and the teacher from the same crops, (B, 3, H, W) each, and B captions.

    `teacher_rows` are the teacher's image and text embeddings, (B, D) float16 each, where there is a cache of them.
    `bad` are the pairs that could not be read; others were taken in their place.
    """

    student_pixels: Tensor
    teacher_pixels: Tensor | None
    captions: list[str]
    bad: tuple[Bad, ...] = ()
    teacher_rows: tuple[Tensor, Tensor] | None = None


View = tuple[int, int]  # epoch and index of the pair


class PairView(NamedTuple):
    """Pixels for student and teacher, (3, H, W) each, a caption, bad pairs passed over, the teacher's embeddings."""

    student: npt.NDArray[np.float32]
    teacher: npt.NDArray[np.float32] | None
    caption: str
    bad: tuple[Bad, ...]
    rows: tuple[Half, Half] | None = None


class ViewDataset(Dataset[PairView]):
    """A view of a pair: one crop of the picture and one of its captions, chosen by (seed, epoch, index).

    Args:
        views: different views of a pair that there are; epochs go through them again and again. 0: each is new.

    Attributes:
        cache: where the teacher's embeddings of these very views are read, or None.
        bad: counts the samples that cannot be read; `step_loader` adds what it meets.

    Raises:
        InputError: the pairs leave out more than `max_bad` of their samples.
    """

    def __init__(
        self,
        pairs: Pairs,
        student: Preprocessing,
        teacher: Preprocessing | None,
        *,
        crop_scale: tuple[float, float],
        seed: int,
        views: int = 0,
        max_bad: float = MAX_SHARE,
    ) -> None:
        self.cache: TeacherCache | None = None
        self.views = views
        self.bad = BadSamples(pairs, max_share=max_bad)
        self.pairs, self.student, self.teacher = pairs, student, teacher
        self.crop_scale, self.seed = crop_scale, seed

    def __getitem__(self, view: View) -> PairView:
        epoch, index = view
        if self.views:
            epoch %= self.views
        rng = np.random.default_rng((self.seed, epoch, index))
        pair = self.bad.sound(index)
        if not isinstance(pair, SoundPair):
            # An exception would leave a worker process as a traceback: `step_loader` says in one sentence what is bad.
            return PairView(np.zeros((3, *self.student.size), dtype=np.float32), None, "", pair)
        box = random_crop(pair.image.size, self.crop_scale, rng)
        caption = pair.captions[int(rng.integers(len(pair.captions)))]
        student = preprocess_crop(pair.image, box, self.student)
        if self.teacher is None:
            rows = self.cache.row(epoch, index) if self.cache else None
            return PairView(student, None, caption, pair.passed_over, rows)
        same = self.teacher == self.student
        teacher = student if same else preprocess_crop(pair.image, box, self.teacher)
        return PairView(student, teacher, caption, pair.passed_over)


class StepSampler(Sampler[list[View]]):
    """The views of each step from `start` on; epochs are shuffled by (seed, epoch), and a remainder is left out.

    Args:
        batch_size: of all processes together; each gets its part of the same global batch.
        rank, processes: which part this is, of how many.
    """

    def __init__(
        self, count: int, batch_size: int, *, seed: int, start: int, stop: int, rank: int = 0, processes: int = 1
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.start, self.stop = start, stop
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator[list[View]]:
        per_epoch = self.count // self.batch_size
        order, of_epoch = np.empty(0, dtype=np.int64), -1
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, per_epoch)
            if epoch != of_epoch:
                order, of_epoch = np.random.default_rng((self.seed, epoch)).permutation(self.count), epoch
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            own = len(chosen) // self.processes
            yield [(epoch, int(index)) for index in chosen[self.rank * own : (self.rank + 1) * own]]

    def __len__(self) -> int:
        return self.stop - self.start


def random_crop(size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """A box of a share of the area within `scale` and an aspect ratio within 3:4 to 4:3, as torchvision chooses it."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # Nothing fitted, as with a very long picture: the largest middle part that keeps the ratio in bounds.
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def step_loader(dataset: ViewDataset, sampler: Iterable[list[View]], *, workers: int = -1) -> Iterator[Batch]:
    """Batches of `sampler`'s steps in order, prepared ahead by worker processes.

    Args:
        workers: processes; 0 prepares in the training process; -1 takes half of the cores, at most 8.

    Raises:
        InputError: while it is gone through, when more samples turned out to be bad than the data set allows.
    """
    if workers < 0:
        workers = min(8, (os.cpu_count() or 1) // 2)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, collate_fn=_collate, pin_memory=torch.cuda.is_available()
    )
    for batch in loader:
        dataset.bad.add(batch.bad)
        yield batch


def _collate(views: list[PairView]) -> Batch:
    student = torch.from_numpy(np.stack([view.student for view in views]))
    teacher_views = [view.teacher for view in views if view.teacher is not None]
    if not teacher_views:
        teacher = None
    elif teacher_views[0] is views[0].student:
        teacher = student
    else:
        teacher = torch.from_numpy(np.stack(teacher_views))
    captions, bad = [view.caption for view in views], tuple(bad for view in views for bad in view.bad)
    return Batch(student, teacher, captions, bad, _stacked([view.rows for view in views if view.rows is not None]))


def _stacked(rows: list[tuple[Half, Half]]) -> tuple[Tensor, Tensor] | None:
    if not rows:
        return None
    images, texts = zip(*rows, strict=True)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(texts))
