from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from support import Watch

from clip_rd_edge.benchmarking import accuracy
from clip_rd_edge.benchmarking.accuracy import evaluate, retrieval, zero_shot
from clip_rd_edge.benchmarking.metrics import RetrievalScore, ZeroShotScore
from clip_rd_edge.contract.task import RetrievalTask, ZeroShotTask
from clip_rd_edge.errors import ClipRdEdgeError, InputError

Make = Callable[..., Any]


def test_zero_shot_of_a_perfect_encoder(make_encoder: Make, colour_task: ZeroShotTask) -> None:
    found = zero_shot(make_encoder(), colour_task)
    assert found.answers == colour_task.targets
    assert (found.score.top1, found.score.top5, found.score.mean_per_class) == (1, 1, 1)
    assert (found.score.images, found.score.classes) == (6, 6)
    # exp(10 · 1) against the cosines of red's neighbours: two at 1/3 (yellow, magenta), two at -1/3, one at -1.
    others = 2 * np.exp(10 / 3) + 2 * np.exp(-10 / 3) + np.exp(-10)
    assert found.probabilities[0] == pytest.approx(np.exp(10) / (np.exp(10) + others), rel=1e-4)


def test_zero_shot_of_one_that_is_wrong_by_half(make_encoder: Make, colour_task: ZeroShotTask) -> None:
    encoder = make_encoder(known=("red", "green", "blue"))
    found = zero_shot(encoder, colour_task)
    right = [a == t for a, t in zip(found.answers, colour_task.targets, strict=True)]
    assert found.score.top1 == pytest.approx(np.mean(right))
    assert found.score.top1_interval.low < found.score.top1 < found.score.top1_interval.high
    assert 0 < found.score.top1 < 1


def test_too_few_labels_for_a_top5(make_encoder: Make, colour_task: ZeroShotTask) -> None:
    short = msgspec.structs.replace(
        colour_task, images=colour_task.images[:3], targets=colour_task.targets[:3], labels=colour_task.labels[:3]
    )
    assert zero_shot(make_encoder(), short).score.top5 is None


def test_retrieval_counts_any_caption_of_a_picture(make_encoder: Make, colour_retrieval: RetrievalTask) -> None:
    score = retrieval(make_encoder(), colour_retrieval).score
    # Each picture finds its colour's name first; red's second caption finds blue's picture.
    assert score.image_to_text.at1 == 1
    assert score.text_to_image.at1 == pytest.approx(6 / 7)
    assert (score.images, score.captions) == (6, 7)
    assert score.text_to_image.at10 is None


def test_evaluate_takes_either_kind(
    make_encoder: Make, colour_task: ZeroShotTask, colour_retrieval: RetrievalTask
) -> None:
    assert isinstance(evaluate(make_encoder(), colour_task), ZeroShotScore)
    assert isinstance(evaluate(make_encoder(), colour_retrieval), RetrievalScore)


def test_pictures_are_opened_in_batches(
    make_encoder: Make, colour_task: ZeroShotTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "BATCH_SIZE", 4)
    encoder, watch = make_encoder(), Watch()
    zero_shot(encoder, colour_task, reporter=watch)
    assert encoder.batches == [4, 2]
    assert [(step, total) for _, step, total in watch.updates] == [(4, 6), (6, 6)]


def test_nan_is_an_error_and_not_a_low_score(make_encoder: Make, colour_task: ZeroShotTask) -> None:
    encoder = make_encoder(name="broken")
    encoder.encode_pixels = lambda pixels: np.full((len(pixels), 3), np.nan, dtype=np.float32)
    with pytest.raises(ClipRdEdgeError, match=r"broken gives NaN or infinity for the pictures from .*red"):
        zero_shot(encoder, colour_task)


def test_a_task_without_pictures_or_captions(
    make_encoder: Make, colour_task: ZeroShotTask, colour_retrieval: RetrievalTask
) -> None:
    with pytest.raises(InputError, match="'colours' has no pictures"):
        zero_shot(make_encoder(), msgspec.structs.replace(colour_task, images=(), targets=()))
    with pytest.raises(InputError, match="'colours, retrieval' has no captions"):
        retrieval(make_encoder(), msgspec.structs.replace(colour_retrieval, captions=(), caption_images=()))
