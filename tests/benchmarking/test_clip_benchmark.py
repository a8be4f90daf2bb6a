"""Scores equal those of CLIP_benchmark exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification as classification
from clip_benchmark.metrics import zeroshot_retrieval as ranking
from PIL import Image

from clip_rd_edge.benchmarking.accuracy import retrieval, zero_shot
from clip_rd_edge.bundle.encoder import Description, Embeddings, normalise
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.preprocess import Preprocessing, preprocess
from clip_rd_edge.data.tasks import RetrievalTask, Task, ZeroShotTask

PREPROCESSING = Preprocessing(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
WIDTH = 6


class RandomClip:
    """Projects pixels and letters randomly, with the methods of open_clip's models and those of an `Encoder`."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.image = torch.randn(3 * 8 * 8, WIDTH, generator=generator)
        self.text = torch.randn(128, WIDTH, generator=generator)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1) @ self.image

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return self.text[ids].mean(dim=1)

    def describe(self) -> Description:
        return Description(
            name="random",
            runtime="torch",
            precision="fp32",
            embedding_size=WIDTH,
            preprocessing=PREPROCESSING,
            logit_scale=100,
        )

    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        pixels = np.stack([preprocess(image, PREPROCESSING) for image in images])
        return normalise(self.encode_image(torch.from_numpy(pixels)).numpy())

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        return normalise(self.encode_text(tokenize(texts)).numpy())


def tokenize(texts: Sequence[str]) -> torch.Tensor:
    return torch.tensor([[ord(letter) for letter in text.ljust(40)[:40]] for text in texts])


class Loader:
    """Yields batches like CLIP_benchmark's data loaders: pixels, and classes or captions."""

    def __init__(self, task: Task, annotations: Sequence[object], classes: Sequence[str] = ()) -> None:
        self.task, self.annotations = task, annotations
        self.dataset = SimpleNamespace(classes=classes)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, object]]:
        for start in range(0, len(self.task.images), 16):
            images = self.task.images[start : start + 16]
            annotations = self.annotations[start : start + 16]
            pixels = torch.from_numpy(np.stack([preprocess(open_image(image), PREPROCESSING) for image in images]))
            yield pixels, torch.tensor(annotations) if self.dataset.classes else annotations


def random_images(folder: Path, count: int) -> tuple[Path, ...]:
    rng, paths = np.random.default_rng(1), tuple(folder / f"{number}.png" for number in range(count))
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (9, 11, 3)).astype(np.uint8)).save(path)
    return paths


def accuracy(output: torch.Tensor, target: torch.Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Replaces CLIP_benchmark's function, which calls float() on an array of one entry: an error since numpy 2.4."""
    correct = output.topk(max(topk), 1, True, True)[1].t().eq(target)
    return [correct[:k].sum().item() / len(target) for k in topk]


def test_zero_shot_accuracy_equals_clip_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classification, "accuracy", accuracy)
    labels = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
    templates = ["a photo of a {c}.", "the {c}", "{c} in a tree"]
    classes = np.random.default_rng(2).integers(0, 6, 90) // np.array([1, 1, 2] * 30)  # uneven, without any gnu
    ours = tuple(template.replace("{c}", "{}") for template in templates)
    images, targets = random_images(tmp_path, 90), tuple(classes.tolist())
    task = ZeroShotTask(name="animals", images=images, targets=targets, labels=labels, templates=ours)
    loader = Loader(task, task.targets, labels)
    theirs = classification.evaluate(RandomClip(), loader, tokenize, labels, templates, "cpu", amp=False)
    score = zero_shot(RandomClip(), task).score
    assert (score.top1, score.top5, score.mean_per_class) == (
        theirs["acc1"], theirs["acc5"], theirs["mean_per_class_recall"],
    )  # fmt: skip
    assert 0 < score.top1 < score.top5 < 1


def test_retrieval_with_five_captions_per_image_equals_clip_benchmarks(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    captions = [["".join(map(chr, rng.integers(97, 122, 30))) for _ in range(5)] for _ in range(30)]
    pairs = [(caption, number) for number, of_image in enumerate(captions) for caption in of_image]
    task = RetrievalTask.of("letters", random_images(tmp_path, 30), pairs)
    theirs = ranking.evaluate(
        RandomClip(), Loader(task, captions), tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    ours = retrieval(RandomClip(), task).score
    for direction, recall in (("image", ours.text_to_image), ("text", ours.image_to_text)):
        for k, value in ((1, recall.at1), (5, recall.at5), (10, recall.at10)):
            assert value is not None
            # CLIP_benchmark averages in float32.
            assert np.float32(value) == np.float32(theirs[f"{direction}_retrieval_recall@{k}"])
    assert 0 < ours.image_to_text.at1 < 1
    assert (ours.images, ours.captions) == (30, 150)
