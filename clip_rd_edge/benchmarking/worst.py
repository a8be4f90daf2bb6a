"""The classes that a model gets wrong, with pictures: what to look at, and what more data is needed of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from clip_rd_edge.benchmarking.answers import ZeroShotAnswers
from clip_rd_edge.benchmarking.results import WorstClass
from clip_rd_edge.benchmarking.samples import thumbnail
from clip_rd_edge.contract.task import ZeroShotTask

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
        pictures=len(of_class),
        png=thumbnail(task.images[int(wrong[0])]),
        taken_for=task.labels[taken_for],
        taken_for_png=thumbnail(task.images[int(alike[0])]) if len(alike) else b"",
    )
