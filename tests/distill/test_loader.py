from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from clip_rd_edge.contract.preprocess import Preprocessing
from clip_rd_edge.data.pairs import load_pairs
from clip_rd_edge.distill.loader import StepSampler, ViewDataset, random_crop, step_loader

HOW = Preprocessing(size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1))
OTHER = Preprocessing(size=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def batches(path: Path, start: int, stop: int, *, workers: int = 0, teacher: Preprocessing | None = None):  # type: ignore[no-untyped-def]
    pairs = load_pairs(str(path))
    dataset = ViewDataset(pairs, HOW, teacher, crop_scale=(0.5, 1.0), seed=3)
    return list(step_loader(dataset, StepSampler(24, 5, seed=3, start=start, stop=stop), workers=workers))


def test_a_resumed_loader_sees_what_an_uninterrupted_one_saw(pairs_csv: Path) -> None:
    whole, rest = batches(pairs_csv, 0, 10), batches(pairs_csv, 6, 10, workers=2)
    for expected, got in zip(whole[6:], rest, strict=True):
        assert expected.captions == got.captions
        assert torch.equal(expected.student_pixels, got.student_pixels)


def test_an_epoch_shows_no_pair_twice_and_the_next_is_shuffled_anew(pairs_csv: Path) -> None:
    views = [view for step in StepSampler(24, 5, seed=0, start=0, stop=8) for view in step]
    first, second = [i for e, i in views if e == 0], [i for e, i in views if e == 1]
    assert len(first) == len(set(first)) == 20
    assert first != second


def test_crops_differ_from_epoch_to_epoch(pairs_csv: Path) -> None:
    dataset = ViewDataset(load_pairs(str(pairs_csv)), HOW, None, crop_scale=(0.2, 0.9), seed=0)
    assert not np.array_equal(dataset[0, 0][0], dataset[1, 0][0])


def test_the_teacher_gets_the_same_crop_in_its_own_preprocessing(pairs_csv: Path) -> None:
    (batch,) = batches(pairs_csv, 0, 1, teacher=OTHER)
    assert batch.teacher_pixels is not None
    assert batch.teacher_pixels.shape == (5, 3, 16, 16)
    ours, theirs = batch.student_pixels.mean((2, 3)), batch.teacher_pixels.mean((2, 3)) * 0.5 + 0.5
    torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0)


def test_equal_preprocessing_is_done_once(pairs_csv: Path) -> None:
    (batch,) = batches(pairs_csv, 0, 1, teacher=HOW)
    assert batch.teacher_pixels is batch.student_pixels


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (64, 48)])
def test_crops_lie_within_the_picture(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        left, top, right, bottom = random_crop(size, (0.3, 1.0), rng)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
