"""A few pictures for the report, with what models said to them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from clip_rd_edge.benchmarking.accuracy import ZeroShotAnswers
from clip_rd_edge.benchmarking.results import Answer, RowResult, Sample, WorstClass
from clip_rd_edge.contract.images import ImageFile, open_image
from clip_rd_edge.contract.task import ZeroShotTask

EACH = 6  # right ones, and as many wrong ones
EDGE = 128  # pixels, at most


def choose_samples(
    rows: Sequence[RowResult], task: ZeroShotTask, answers: Mapping[str, ZeroShotAnswers], *, seed: int = 0
) -> tuple[Sample, ...]:
    """Pictures drawn by lot, up to EACH that the last row got right, then up to EACH that it got wrong.

    They show what the last row said, and the teacher where there is one: what went in and what came out.

    Args:
        answers: by the rows' labels.
    """
    teachers = [row.label for row in rows if row.role == "teacher"]
    given = {label: answers[label] for label in (*teachers[:1], rows[-1].label)}
    hits = given[rows[-1].label].hits(task)
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for candidates in (np.flatnonzero(hits), np.flatnonzero(~hits)):
        chosen += rng.permutation(candidates)[:EACH].tolist()
    return tuple(_sample(task, given, index) for index in chosen)


def _sample(task: ZeroShotTask, answers: Mapping[str, ZeroShotAnswers], index: int) -> Sample:
    return Sample(
        task=task.name,
        png=thumbnail(task.images[index]),
        label=task.labels[task.targets[index]],
        answers=tuple(
            Answer(
                row=row,
                label=task.labels[given.answers[index]],
                probability=given.probabilities[index],
                right=given.answers[index] == task.targets[index],
            )
            for row, given in answers.items()
        ),
    )


def thumbnail(picture: ImageFile) -> bytes:
    """A small PNG of a picture."""
    image = open_image(picture)
    image.thumbnail((EDGE, EDGE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


COUNT = 6


def worst_classes(row: str, task: ZeroShotTask, answers: Mapping[str, ZeroShotAnswers]) -> tuple[WorstClass, ...]:
    """Up to COUNT classes of lowest accuracy, those first where the row was surest of its wrong answers.

    Classes that it always gets right are left out.
    """
    given = answers[row]
    hits = given.hits(task)
    targets, said = np.asarray(task.targets), np.asarray(given.answers)
    sure = np.asarray(given.probabilities)
    ranked: list[tuple[float, float, int]] = []
    for label in np.unique(targets):
        of_class = targets == label
        wrong = of_class & ~hits
        if wrong.any():
            ranked.append((float(hits[of_class].mean()), -float(sure[wrong].mean()), int(label)))
    return tuple(_worst(row, task, hits, targets, said, label) for _, _, label in sorted(ranked)[:COUNT])


def _worst(
    row: str,
    task: ZeroShotTask,
    hits: np.ndarray[tuple[int], np.dtype[np.bool_]],
    targets: np.ndarray[tuple[int], np.dtype[np.int64]],
    said: np.ndarray[tuple[int], np.dtype[np.int64]],
    label: int,
) -> WorstClass:
    of_class = np.flatnonzero(targets == label)
    wrong = of_class[~hits[of_class]]
    taken_for = Counter(said[wrong].tolist()).most_common(1)[0][0]
    # A picture of what it was taken for tells whether the two look alike; a class of labels alone has none.
    alike = np.flatnonzero(targets == taken_for)
    return WorstClass(
        row=row,
        task=task.name,
        label=task.labels[label],
        right=int(hits[of_class].sum()),
        images=len(of_class),
        png=thumbnail(task.images[int(wrong[0])]),
        taken_for=task.labels[taken_for],
        taken_for_png=thumbnail(task.images[int(alike[0])]) if len(alike) else b"",
    )
