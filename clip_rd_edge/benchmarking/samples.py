"""Example images for the report, with the models' predictions."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from clip_rd_edge.benchmarking.accuracy import ZeroShotAnswers
from clip_rd_edge.benchmarking.results import Answer, RowResult, Sample, WorstClass
from clip_rd_edge.bundle.images import ImageFile, open_image
from clip_rd_edge.data.tasks import ZeroShotTask

SAMPLES_PER_OUTCOME = 6  # correct ones, and as many wrong ones
THUMBNAIL_EDGE = 128  # max pixels


def choose_samples(
    rows: Sequence[RowResult], task: ZeroShotTask, answers: Mapping[str, ZeroShotAnswers]
) -> tuple[Sample, ...]:
    """Sample images at random: up to SAMPLES_PER_OUTCOME that the last row classified correctly, then as many errors.

    Each sample has the predictions of the last row and, if there is one, of the teacher: the result of the whole
    process beside its starting point.

    Args:
        answers: the predictions, by row label.
    """
    teachers = [row.label for row in rows if row.role == "teacher"]
    shown = {label: answers[label] for label in (*teachers[:1], rows[-1].label)}
    hits = shown[rows[-1].label].hits(task)
    rng = np.random.default_rng(0)
    indices: list[int] = []
    for candidates in (np.flatnonzero(hits), np.flatnonzero(~hits)):
        indices += rng.permutation(candidates)[:SAMPLES_PER_OUTCOME].tolist()
    return tuple(_sample(task, shown, index) for index in indices)


def _sample(task: ZeroShotTask, answers: Mapping[str, ZeroShotAnswers], index: int) -> Sample:
    return Sample(
        task=task.name,
        png=thumbnail(task.images[index]),
        label=task.labels[task.targets[index]],
        answers=tuple(
            Answer(
                row=row,
                label=task.labels[predictions.answers[index]],
                probability=predictions.probabilities[index],
                right=predictions.answers[index] == task.targets[index],
            )
            for row, predictions in answers.items()
        ),
    )


def thumbnail(file: ImageFile) -> bytes:
    """Return a small PNG of an image file."""
    return thumbnail_of(open_image(file))


def thumbnail_of(image: Image.Image) -> bytes:
    """Return a small PNG of an image."""
    image = image.copy()
    image.thumbnail((THUMBNAIL_EDGE, THUMBNAIL_EDGE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


MAX_WORST_CLASSES = 6


def worst_classes(row: str, task: ZeroShotTask, answers: Mapping[str, ZeroShotAnswers]) -> tuple[WorstClass, ...]:
    """Return up to MAX_WORST_CLASSES classes of lowest accuracy; ties go to the most confident errors.

    Classes without errors are left out.
    """
    predictions = answers[row]
    hits = predictions.hits(task)
    targets, predicted = np.asarray(task.targets), np.asarray(predictions.answers)
    confidence = np.asarray(predictions.probabilities)
    ranked: list[tuple[float, float, int]] = []
    for label in np.unique(targets):
        in_class = targets == label
        wrong = in_class & ~hits
        if wrong.any():
            ranked.append((float(hits[in_class].mean()), -float(confidence[wrong].mean()), int(label)))
    return tuple(
        _worst_class(row, task, hits, targets, predicted, label) for _, _, label in sorted(ranked)[:MAX_WORST_CLASSES]
    )


def _worst_class(
    row: str,
    task: ZeroShotTask,
    hits: np.ndarray[tuple[int], np.dtype[np.bool_]],
    targets: np.ndarray[tuple[int], np.dtype[np.int64]],
    predicted: np.ndarray[tuple[int], np.dtype[np.int64]],
    label: int,
) -> WorstClass:
    in_class = np.flatnonzero(targets == label)
    wrong = in_class[~hits[in_class]]
    taken_for = Counter(predicted[wrong].tolist()).most_common(1)[0][0]
    # An image of the predicted class shows whether the two look alike; some classes of a task have no images.
    of_predicted_class = np.flatnonzero(targets == taken_for)
    return WorstClass(
        row=row,
        task=task.name,
        label=task.labels[label],
        right=int(hits[in_class].sum()),
        images=len(in_class),
        png=thumbnail(task.images[int(wrong[0])]),
        taken_for=task.labels[taken_for],
        taken_for_png=thumbnail(task.images[int(of_predicted_class[0])]) if len(of_predicted_class) else b"",
    )
