"""A few pictures for the report, with what models said to them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np

from clip_rd_edge.benchmarking.answers import ZeroShotAnswers
from clip_rd_edge.benchmarking.results import Answer, RowResult, Sample
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
