"""Batches as a function of seed and step alone: what a run sees is the same after a resume, on any machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clip_rd_edge.contract.preprocess import Box, Preprocessing, open_image, preprocess_crop
from clip_rd_edge.data.pairs import Pairs


@dataclass(frozen=True)
class Batch:
    """B pairs: pixels for the student and the teacher from the same crops, (B, 3, H, W) each, and B captions."""

    student_pixels: Tensor
    teacher_pixels: Tensor | None
    captions: list[str]


View = tuple[int, int]  # epoch and index of the pair


class ViewDataset(Dataset[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None, str]]):
    """A view of a pair: one crop of the picture and one of its captions, chosen by (seed, epoch, index)."""

    def __init__(
        self,
        pairs: Pairs,
        student: Preprocessing,
        teacher: Preprocessing | None,
        *,
        crop_scale: tuple[float, float],
        seed: int,
    ) -> None:
        self.pairs, self.student, self.teacher = pairs, student, teacher
        self.crop_scale, self.seed = crop_scale, seed

    def __getitem__(self, view: View) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None, str]:
        epoch, index = view
        rng = np.random.default_rng((self.seed, epoch, index))
        image = open_image(self.pairs.images[index])
        box = random_crop(image.size, self.crop_scale, rng)
        captions = self.pairs.captions[index]
        caption = captions[int(rng.integers(len(captions)))]
        student = preprocess_crop(image, box, self.student)
        if self.teacher is None:
            return student, None, caption
        same = self.teacher == self.student
        return student, student if same else preprocess_crop(image, box, self.teacher), caption


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


def step_loader(dataset: ViewDataset, sampler: StepSampler, *, workers: int = -1) -> DataLoader[Any]:
    """Batches of `sampler`'s steps in order, prepared ahead by worker processes.

    Args:
        workers: processes; 0 prepares in the training process; -1 takes half of the cores, at most 8.
    """
    if workers < 0:
        workers = min(8, (os.cpu_count() or 1) // 2)
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, collate_fn=_collate, pin_memory=torch.cuda.is_available()
    )


def _collate(views: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None, str]]) -> Batch:
    student = torch.from_numpy(np.stack([view[0] for view in views]))
    teacher_views = [view[1] for view in views if view[1] is not None]
    if not teacher_views:
        teacher = None
    elif teacher_views[0] is views[0][0]:
        teacher = student
    else:
        teacher = torch.from_numpy(np.stack(teacher_views))
    return Batch(student, teacher, [view[2] for view in views])
