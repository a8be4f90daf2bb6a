"""What a student predicts about a dozen images, always the same ones, to look at while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from clip_rd_edge.bundle.encoder import label_embeddings, probabilities
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.preprocess import Pixels, preprocess
from clip_rd_edge.data.mixed import pair_count
from clip_rd_edge.data.samples import BadSamples, Pairs
from clip_rd_edge.data.tasks import RetrievalTask, Task, ZeroShotTask
from clip_rd_edge.distillation.monitoring.plots import Prediction, plot_predictions
from clip_rd_edge.models.encoder import TorchEncoder

SAMPLES = 12
MAX_LABELS = 64  # of a task with more; a thousand would take the time of many steps


@dataclass
class Predictions:
    """A student's predictions about images of a task or, without one, of the pairs that it is trained on.

    An image of a class is compared with the task's labels; one with a caption, with the captions of the others.
    """

    task: Task | None
    pairs: Pairs
    encoder: TorchEncoder

    def plot(self, path: Path) -> None:
        """Plot the predictions into a PNG file; without a task and pairs, there are none."""
        if not (self.task or pair_count(self.pairs)):
            return
        thumbnails, pixels, own = self._samples
        labels, template = list[str](), "{}"
        if isinstance(self.task, ZeroShotTask):
            order = np.random.default_rng(0).permutation(len(self.task.labels))
            labels, template = [self.task.labels[index] for index in order[:MAX_LABELS]], self.task.templates[0]
        texts = list(dict.fromkeys([*own, *labels]))
        embeddings = label_embeddings(self.encoder, texts, [template])
        rows = probabilities(self.encoder.encode_pixels(pixels), embeddings, self.encoder.clip.logit_scale)
        found = [texts[row.argmax()] for row in rows]
        plot_predictions(list(map(Prediction, thumbnails, own, found, rows.max(axis=1).tolist())), path)

    @cached_property
    def _samples(self) -> tuple[list[Image.Image], Pixels, list[str]]:
        """N thumbnails, the model's inputs (N, 3, H, W), and the right texts."""
        thumbnails, pixels, texts = list[Image.Image](), list[Pixels](), list[str]()
        for image, text in self._open():
            pixels.append(preprocess(image, self.encoder.clip.preprocessing))
            thumbnails.append(image.copy())
            thumbnails[-1].thumbnail((128, 128))
            texts.append(text)
        return thumbnails, np.stack(pixels), texts

    def _open(self) -> Iterator[tuple[Image.Image, str]]:
        """Open some images, chosen at random, each with its class or its first caption."""
        task, permutation = self.task, np.random.default_rng(0).permutation
        if task is None:
            bad = BadSamples(self.pairs, max_share=1)
            for pair in map(bad.take, permutation(pair_count(self.pairs))[:SAMPLES].tolist()):
                yield pair.image, pair.captions[0]
        elif isinstance(task, RetrievalTask):
            captions = task.first_captions()
            for index in permutation(sorted(captions))[:SAMPLES].tolist():
                yield open_image(task.images[index]), task.captions[captions[index]]
        else:
            for index in permutation(len(task.images))[:SAMPLES].tolist():
                yield open_image(task.images[index]), task.labels[task.targets[index]]
