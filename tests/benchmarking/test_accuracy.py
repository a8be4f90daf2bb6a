from __future__ import annotations

import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from clip_rd_edge.benchmarking import accuracy
from clip_rd_edge.benchmarking.accuracy import (
    IMAGE_TO_TEXT,
    TEXT_TO_IMAGE,
    TOP1,
    pack_correctness,
    retrieval,
    task_fingerprint,
    zero_shot,
)
from clip_rd_edge.bundle.encoder import normalise
from clip_rd_edge.bundle.images import ImageFile
from clip_rd_edge.data.shard_index import open_shard
from clip_rd_edge.data.tasks import RetrievalTask, ZeroShotTask

Make = Callable[..., Any]


def test_zero_shot_of_a_perfect_encoder(make_encoder: Make, colour_task: ZeroShotTask) -> None:
    answers = zero_shot(make_encoder(), colour_task)
    assert answers.labels == colour_task.targets
    assert (answers.score.top1, answers.score.top5, answers.score.mean_per_class) == (1, 1, 1)
    assert (answers.score.images, answers.score.classes) == (6, 6)
    # exp(10 · 1) against the cosines of red's neighbours: two at 1/3 (yellow, magenta), two at -1/3, one at -1.
    others = 2 * np.exp(10 / 3) + 2 * np.exp(-10 / 3) + np.exp(-10)
    assert answers.probabilities[0] == pytest.approx(np.exp(10) / (np.exp(10) + others), rel=1e-4)


def test_zero_shot_of_many_images_and_labels_needs_no_matrix_of_all_pairs(
    make_encoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = tuple(f"label {number}" for number in range(500))
    images = normalise(np.random.default_rng(0).normal(size=(5_000, 3)))
    monkeypatch.setattr(accuracy, "embed_images", lambda *_: images)
    encoder = make_encoder()
    task = ZeroShotTask(name="t", images=(Path(),) * len(images), targets=(0,) * len(images), labels=labels)
    tracemalloc.start()
    answers = zero_shot(encoder, task)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6  # all similarities take 10 MB, and as many again for their softmax
    logits = 10.0 * images @ encoder.encode_texts(labels).T
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert list(answers.labels) == logits.argmax(axis=1).tolist()
    np.testing.assert_allclose(
        answers.probabilities, (expected / expected.sum(axis=1, keepdims=True)).max(axis=1), 1e-5
    )


def test_retrieval_accepts_any_caption_of_an_image(make_encoder: Make, colour_retrieval: RetrievalTask) -> None:
    answers = retrieval(make_encoder(), colour_retrieval)
    score, (images, captions) = answers.score, answers.correctness
    # The name of its colour ranks first for each image; red's second caption finds the blue image.
    assert score.image_to_text.at1 == 1
    assert score.text_to_image.at1 == pytest.approx(6 / 7)
    assert (score.images, score.captions) == (6, 7)
    assert score.text_to_image.at10 is None
    assert (images.measure, images.hits().tolist()) == (IMAGE_TO_TEXT, [True] * 6)
    assert (captions.measure, captions.hits().tolist()) == (TEXT_TO_IMAGE, [True] * 6 + [False])


def test_corrected_labels_and_captions_make_other_questions(
    colour_task: ZeroShotTask, colour_retrieval: RetrievalTask
) -> None:
    hits, swapped = np.ones(6, dtype=bool), (1, 0)
    corrected = (
        replace(colour_task, targets=(*swapped, *colour_task.targets[2:])),
        replace(colour_retrieval, caption_images=(*swapped, *colour_retrieval.caption_images[2:])),
    )
    for task, other in zip((colour_task, colour_retrieval), corrected, strict=True):
        assert pack_correctness(task, TOP1, hits).questions != pack_correctness(other, TOP1, hits).questions


@pytest.mark.parametrize("in_shard", [False, True])
def test_a_renewed_test_set_is_told_from_the_old_one_and_a_moved_one_is_not(tmp_path: Path, in_shard: bool) -> None:
    digests = []
    for folder, content in (("2025", b"old"), ("moved", b"old"), ("2026", b"renewed")):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "s0000000.jpg"
        file.write_bytes(content)
        image: ImageFile | None = file
        if in_shard:
            with tarfile.open(tmp_path / folder / "0.tar", "w") as shard:
                shard.add(file, file.name)
            image = open_shard(tmp_path / folder / "0.tar").files(0)["image"]
        assert image is not None
        task = ZeroShotTask(name="t", images=(image,), targets=(0,), labels=("a", "b"))
        packed = pack_correctness(task, TOP1, np.ones(1, dtype=bool))
        digests.append((packed.questions, packed.images, task_fingerprint(task)))
    assert digests[0] == digests[1]
    assert digests[0][0] == digests[2][0]
    assert digests[0][1] != digests[2][1]
    assert len({task_fingerprint(replace(task, labels=("a", "c"))), *(digest[2] for digest in digests)}) == 3
