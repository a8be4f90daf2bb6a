"""A trained model on the suite's tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from clip_rd_edge.benchmarking.accuracy import evaluate, zero_shot
from clip_rd_edge.contract.encoder import Encoder
from clip_rd_edge.contract.images import open_image
from clip_rd_edge.contract.task import RetrievalTask, Task, ZeroShotTask
from clip_rd_edge.distill.metrics import pair_similarities
from clip_rd_edge.evidence.results import Geometry, ModelResult, TaskResult


def measure(encoder: Encoder, tasks: Sequence[Task], *, name: str) -> ModelResult:
    """Scores, hits and geometry of a model.

    Args:
        name: the model's, as tables show it.
    """
    return ModelResult(
        model=name,
        parameters=encoder.describe().parameters or 0,
        tasks=tuple(_measure_task(encoder, task) for task in tasks),
    )


def top1(encoder: Encoder, tasks: Sequence[Task]) -> dict[str, float]:
    """Top-1 of each zero-shot task by its name: the points of a learning curve."""
    return {task.name: zero_shot(encoder, task).score.top1 for task in tasks if isinstance(task, ZeroShotTask)}


def _measure_task(encoder: Encoder, task: Task) -> TaskResult:
    if isinstance(task, ZeroShotTask):
        answers = zero_shot(encoder, task)
        return TaskResult(score=answers.score, hits="".join("01"[int(hit)] for hit in answers.hits(task)))
    return TaskResult(score=evaluate(encoder, task), geometry=_geometry(encoder, task))


def _geometry(encoder: Encoder, task: RetrievalTask) -> Geometry:
    # One caption a picture, as in training: of several captions of a picture, none is a negative of another.
    first = {picture: caption for caption, picture in reversed([*enumerate(task.caption_images)])}
    shown = sorted(first)
    images = encoder.encode_images([open_image(task.images[picture]) for picture in shown])
    texts = encoder.encode_texts([task.captions[first[picture]] for picture in shown])
    positive, negative = pair_similarities(torch.from_numpy(images), torch.from_numpy(np.ascontiguousarray(texts)))
    return Geometry(positive=positive.mean().item(), negative=negative.mean().item())
