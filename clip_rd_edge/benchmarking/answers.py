"""What an encoder said to every question of a task: what a score leaves out, so that models and runs can be paired."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np

from clip_rd_edge.benchmarking.scores import Hits, RetrievalScore, ZeroShotScore
from clip_rd_edge.contract.task import RetrievalTask, Task, ZeroShotTask

TOP1, IMAGE_TO_TEXT, TEXT_TO_IMAGE = "top-1", "picture → text, R@1", "text → picture, R@1"


class Marks(msgspec.Struct, frozen=True, kw_only=True):
    """Which of N questions of a task were answered rightly.

    Attributes:
        measure: what counts as right, one of TOP1, IMAGE_TO_TEXT and TEXT_TO_IMAGE.
        bits: N bits, the first the highest of the first byte.
        questions: a digest of labels, captions and what belongs to what: marks on other questions cannot be paired.
    """

    task: str
    measure: str
    count: int
    bits: bytes
    questions: str

    def hits(self) -> Hits:
        """One truth value a question, (N,)."""
        return np.unpackbits(np.frombuffer(self.bits, dtype=np.uint8), count=self.count).astype(np.bool_)


class ZeroShotAnswers(msgspec.Struct, frozen=True, kw_only=True):
    """What an encoder said to each of N pictures.

    Attributes:
        answers: index of the label it found best.
        probabilities: the probability it gave to that label.
    """

    score: ZeroShotScore
    answers: tuple[int, ...]
    probabilities: tuple[float, ...]

    def hits(self, task: ZeroShotTask) -> Hits:
        """Which pictures it got right, (N,)."""
        right: Hits = np.asarray(self.answers) == np.asarray(task.targets)
        return right


class RetrievalAnswers(msgspec.Struct, frozen=True, kw_only=True):
    """What an encoder found in both directions: a mark a picture, and a mark a caption."""

    score: RetrievalScore
    marks: tuple[Marks, ...]


Answers = ZeroShotAnswers | RetrievalAnswers


def marks(task: Task, measure: str, hits: Hits) -> Marks:
    """Marks of N answers."""
    return Marks(
        task=task.name,
        measure=measure,
        count=len(hits),
        bits=np.packbits(hits).tobytes(),
        questions=_digest(task),
    )


def marks_of(task: Task, answers: Answers) -> tuple[Marks, ...]:
    """All marks of a model on a task."""
    if isinstance(answers, RetrievalAnswers):
        return answers.marks
    assert isinstance(task, ZeroShotTask)
    return (marks(task, TOP1, answers.hits(task)),)


def _digest(task: Task) -> str:
    # Not the pictures' places: the same data set lies elsewhere on another machine.
    asked = (task.captions, task.caption_images) if isinstance(task, RetrievalTask) else (task.labels, task.targets)
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
