"""What an encoder said to every question of a task: what a score leaves out, so that models and runs can be paired."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np

from clip_rd_edge.benchmarking.metrics import (
    Hits,
    RetrievalScore,
    Score,
    ZeroShotScore,
    best,
    calibration_error,
    found_among_best,
    hit_interval,
    mean_per_class,
    recall_of,
    top_k,
)
from clip_rd_edge.contract.encoder import Embeddings, Encoder, in_batches, label_embeddings, probabilities
from clip_rd_edge.contract.images import ImageFile, open_image
from clip_rd_edge.contract.task import RetrievalTask, Task, ZeroShotTask
from clip_rd_edge.errors import ClipRdEdgeError, InputError
from clip_rd_edge.utils.reporting import SILENT, Reporter

TOP1, IMAGE_TO_TEXT, TEXT_TO_IMAGE = "top-1", "image → text, R@1", "text → image, R@1"


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


BATCH_SIZE = 64


def evaluate(encoder: Encoder, task: Task, *, reporter: Reporter = SILENT, seed: int = 0) -> Score:
    """An encoder's score on a task of either kind; arguments and errors as `zero_shot` and `retrieval`."""
    if isinstance(task, ZeroShotTask):
        return zero_shot(encoder, task, reporter=reporter, seed=seed).score
    return retrieval(encoder, task, reporter=reporter).score


def zero_shot(encoder: Encoder, task: ZeroShotTask, *, reporter: Reporter = SILENT, seed: int = 0) -> ZeroShotAnswers:
    """Zero-shot classification of a task's pictures among its labels.

    Args:
        reporter: told of progress after each batch, the task's name as its stage.
        seed: of the bootstrap.

    Raises:
        InputError: the task has no pictures, or one cannot be read.
        ClipRdEdgeError: the encoder gives NaN or infinity.
    """
    labels = _finite(label_embeddings(encoder, task.labels, task.templates), encoder, "the labels")
    images = _embed_pictures(encoder, task.images, task.name, reporter)
    likely = probabilities(images, labels, encoder.describe().logit_scale)
    # Ranked by similarity, not probability: a softmax in float32 makes ties of small differences.
    ranked = best(images @ labels.T, 5)
    targets = np.asarray(task.targets, dtype=np.int64)
    hits = ranked[:, 0] == targets
    confidence = np.take_along_axis(likely, ranked[:, :1], axis=1)[:, 0]
    score = ZeroShotScore(
        task=task.name,
        images=len(targets),
        classes=len(task.labels),
        top1=float(hits.mean()),
        top1_interval=hit_interval(hits, seed=seed),
        top5=top_k(ranked, targets, 5) if len(task.labels) >= 5 else None,
        mean_per_class=mean_per_class(hits, targets),
        templates=_templates(task),
        calibration_error=calibration_error(confidence, hits),
    )
    return ZeroShotAnswers(
        score=score, answers=tuple(ranked[:, 0].tolist()), probabilities=tuple(confidence.astype(float).tolist())
    )


def _templates(task: ZeroShotTask) -> str:
    """A single prompt as it stands, several by their number and whose they are."""
    if len(task.templates) == 1:
        return task.templates[0]
    return ", ".join(part for part in (str(len(task.templates)), task.templates_from) if part)


def retrieval(encoder: Encoder, task: RetrievalTask, *, reporter: Reporter = SILENT) -> RetrievalAnswers:
    """Retrieval in both directions, with all captions that a picture has; raises as `zero_shot`."""
    if not task.captions:
        raise InputError(f"The task {task.name!r} has no captions.")
    texts = _finite(encoder.encode_texts(task.captions), encoder, "the captions")
    images = _embed_pictures(encoder, task.images, task.name, reporter)
    positive = np.zeros((len(texts), len(images)), dtype=np.bool_)
    positive[np.arange(len(texts)), np.asarray(task.caption_images)] = True
    similarities = texts @ images.T
    captions_found, images_found = (
        found_among_best(similarities.T, positive.T),
        found_among_best(similarities, positive),
    )
    score = RetrievalScore(
        task=task.name,
        images=len(images),
        captions=len(texts),
        image_to_text=recall_of(captions_found, candidates=len(texts)),
        text_to_image=recall_of(images_found, candidates=len(images)),
    )
    both = (marks(task, IMAGE_TO_TEXT, captions_found[:, 0]), marks(task, TEXT_TO_IMAGE, images_found[:, 0]))
    return RetrievalAnswers(score=score, marks=both)


def _embed_pictures(encoder: Encoder, pictures: tuple[ImageFile, ...], task: str, reporter: Reporter) -> Embeddings:
    if not pictures:
        raise InputError(f"The task {task!r} has no pictures.")
    parts = []
    for batch in in_batches(len(pictures), BATCH_SIZE):
        images = [open_image(picture) for picture in pictures[batch]]
        parts.append(_finite(encoder.encode_images(images), encoder, f"the pictures from {pictures[batch.start]} on"))
        reporter.update(task, batch.stop, len(pictures))
    return np.concatenate(parts)


def _finite(embeddings: Embeddings, encoder: Encoder, what: str) -> Embeddings:
    # NaN compares as false with everything: it would pass for a low score instead of a broken model.
    if not np.isfinite(embeddings).all():
        raise ClipRdEdgeError(
            f"The model {encoder.describe().name} gives NaN or infinity for {what}; expected finite embeddings.",
            hint="the weights are damaged or overflow in this precision: train or export it again",
        )
    return embeddings
