"""Evaluate an encoder on a task: its score, and its answer to every example, so that runs can be compared in pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.benchmarking.metrics import (
    CHUNK,
    Hits,
    RetrievalScore,
    Score,
    ZeroShotScore,
    accuracy_interval,
    calibration_error,
    class_scores,
    mean_per_class,
    nearest_indices,
    recall_from_ranks,
    top_k_accuracy,
)
from clip_rd_edge.bundle.encoder import (
    Embeddings,
    Encoder,
    embed_batches,
    in_batches,
    label_embeddings,
    probabilities,
)
from clip_rd_edge.bundle.images import ImageFile, in_bounded_batches, open_image
from clip_rd_edge.data.shard_index import TarMember
from clip_rd_edge.data.tasks import CLASS_NAMES, RetrievalTask, Task, ZeroShotTask
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.paths import is_file
from clip_rd_edge.utils.reporting import SILENT, Reporter

TOP1, IMAGE_TO_TEXT, TEXT_TO_IMAGE = "top-1", "image → text, R@1", "text → image, R@1"


class Correctness(msgspec.Struct, frozen=True, kw_only=True):
    """Which of a task's N examples a model answered correctly.

    Attributes:
        measure: what counts as correct: TOP1, IMAGE_TO_TEXT or TEXT_TO_IMAGE.
        bits: N bits, the first one in the highest bit of the first byte.
        questions: a digest of the labels or captions and their assignment to images; only models with the same digest
            can be compared in pairs.
        images: a digest of the images' names and sizes; empty in results of versions that did not record it.
    """

    task: str
    measure: str
    count: int
    bits: bytes
    questions: str
    images: str = ""

    def hits(self) -> Hits:
        """Return one boolean per example, (N,)."""
        return np.unpackbits(np.frombuffer(self.bits, dtype=np.uint8), count=self.count).astype(np.bool_)


class ZeroShotAnswers(msgspec.Struct, frozen=True, kw_only=True):
    """An encoder's predictions for N images.

    Attributes:
        answers: index of the predicted label of each image.
        probabilities: probability of each predicted label.
    """

    score: ZeroShotScore
    answers: tuple[int, ...]
    probabilities: tuple[float, ...]

    def hits(self, task: ZeroShotTask) -> Hits:
        """Return whether each image was classified correctly, (N,)."""
        hits: Hits = np.asarray(self.answers) == np.asarray(task.targets)
        return hits


class RetrievalAnswers(msgspec.Struct, frozen=True, kw_only=True):
    """An encoder's retrieval results: the score, and which image and caption queries had a positive at rank 1."""

    score: RetrievalScore
    correctness: tuple[Correctness, ...] = msgspec.field(name="marks")


Answers = ZeroShotAnswers | RetrievalAnswers


def pack_correctness(task: Task, measure: str, hits: Hits) -> Correctness:
    """Pack N hits into bits."""
    return Correctness(
        task=task.name,
        measure=measure,
        count=len(hits),
        bits=np.packbits(hits).tobytes(),
        questions=_digest(task),
        images=image_digest(task)[:16],
    )


def correctness_of(task: Task, answers: Answers) -> tuple[Correctness, ...]:
    """Return which examples of the task were answered correctly, once per measure."""
    if isinstance(answers, RetrievalAnswers):
        return answers.correctness
    assert isinstance(task, ZeroShotTask)
    return (pack_correctness(task, TOP1, answers.hits(task)),)


def _digest(task: Task) -> str:
    # Image paths are left out: the same data set may be in another folder on another machine.
    content = (task.captions, task.caption_images) if isinstance(task, RetrievalTask) else (task.labels, task.targets)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def image_digest(task: Task) -> str:
    """Return a digest of the names and sizes of a task's images, wherever they lie."""
    return hashlib.sha256(repr(_names_and_sizes(task)).encode()).hexdigest()


def task_fingerprint(task: Task) -> str:
    """Return a SHA-256 of a task's questions and images, wherever they lie; no image is read."""
    return hashlib.sha256(repr((_names_and_sizes(task), task.questions)).encode()).hexdigest()


def _names_and_sizes(task: Task) -> list[tuple[str, int]]:
    """Return the name of each of a task's images, and its size in bytes, which is 0 where it is unknown."""
    return [(Path(str(image)).name, _size(image)) for image in task.images]


def _size(image: ImageFile) -> int:
    if isinstance(image, TarMember):
        return image.size
    return image.stat().st_size if isinstance(image, Path) and is_file(image) else 0


BATCH_SIZE = 64


def evaluate(encoder: Encoder, task: Task, *, per_class: bool = False, reporter: Reporter = SILENT) -> Score:
    """Score an encoder on a task of either kind; arguments and errors as in `zero_shot` and `retrieval`.

    Args:
        per_class: fill in `ZeroShotScore.per_class`.
    """
    answers = answer(encoder, task, reporter=reporter)
    if not (per_class and isinstance(task, ZeroShotTask) and isinstance(answers, ZeroShotAnswers)):
        return answers.score
    predicted, targets = np.asarray(answers.answers), np.asarray(task.targets)
    scores = class_scores(predicted, targets, task.labels, task.folders)
    return msgspec.structs.replace(answers.score, per_class=scores)


_SHOWN_FOLDERS = 3


def say_class_names(tasks: Sequence[Task], reporter: Reporter) -> None:
    """Say which folders got which names from a classnames.txt: its order may be another than the folders'."""
    for task in tasks:
        if isinstance(task, ZeroShotTask) and task.folders:
            named = [f"{folder} → {label}" for folder, label in zip(task.folders, task.labels, strict=True)]
            if len(named) > _SHOWN_FOLDERS:
                named = [*named[: _SHOWN_FOLDERS - 1], "…", named[-1]]  # by the last, a name that is missing shows
            shown = ", ".join(named)
            reporter.say(f"{task.name}: {CLASS_NAMES} names the folders: {shown}")


def answer(encoder: Encoder, task: Task, *, reporter: Reporter = SILENT) -> Answers:
    """Have an encoder answer a task of either kind; arguments and errors as in `zero_shot` and `retrieval`."""
    if isinstance(task, ZeroShotTask):
        return zero_shot(encoder, task, reporter=reporter)
    return retrieval(encoder, task, reporter=reporter)


def zero_shot(encoder: Encoder, task: ZeroShotTask, *, reporter: Reporter = SILENT) -> ZeroShotAnswers:
    """Classify a task's images zero-shot among its labels.

    Args:
        reporter: receives the progress after each batch, with the task's name as the stage.
    """
    labels = label_embeddings(encoder, task.labels, task.templates)
    images = embed_images(encoder, task.images, task.name, reporter)
    confidence, ranked = _classify(images, labels, encoder.describe().logit_scale)
    targets = np.asarray(task.targets, dtype=np.int64)
    hits = ranked[:, 0] == targets
    score = ZeroShotScore(
        task=task.name,
        images=len(targets),
        classes=len(task.labels),
        top1=float(hits.mean()),
        top1_interval=accuracy_interval(hits),
        top5=top_k_accuracy(ranked, targets, 5) if len(task.labels) >= 5 else None,
        mean_per_class=mean_per_class(hits, targets),
        templates=_describe_templates(task),
        calibration_error=calibration_error(confidence, hits),
    )
    return ZeroShotAnswers(
        score=score, answers=tuple(ranked[:, 0].tolist()), probabilities=tuple(confidence.astype(float).tolist())
    )


def _classify(
    images: Embeddings, labels: Embeddings, logit_scale: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return the probability of each image's first label, (N,), and its first five labels, (N, min(5, C)).

    Only the similarities of CHUNK images at once are in memory.
    """
    # Ranked by similarity, not by probability: a softmax in float32 turns small differences into ties.
    ranked = nearest_indices(images, labels, 5)
    confidence = [
        np.take_along_axis(probabilities(images[chunk], labels, logit_scale), ranked[chunk, :1], axis=1)[:, 0]
        for chunk in in_batches(len(images), CHUNK)
    ]
    return np.concatenate(confidence), ranked


def _describe_templates(task: ZeroShotTask) -> str:
    """Return a single template verbatim; several by their number and origin."""
    if len(task.templates) == 1:
        return task.templates[0]
    return ", ".join(part for part in (str(len(task.templates)), task.templates_from) if part)


def retrieval(encoder: Encoder, task: RetrievalTask, *, reporter: Reporter = SILENT) -> RetrievalAnswers:
    """Retrieve in both directions, with all captions of each image; raises as `zero_shot`."""
    if not task.captions:
        raise InputError(f"The task {task.name!r} has no captions.")
    texts = encoder.encode_texts(task.captions)
    images = embed_images(encoder, task.images, task.name, reporter)
    own_image = np.asarray(task.caption_images)
    ranked_captions: Hits = own_image[nearest_indices(images, texts, 10)] == np.arange(len(images))[:, None]
    ranked_images: Hits = nearest_indices(texts, images, 10) == own_image[:, None]
    score = RetrievalScore(
        task=task.name,
        images=len(images),
        captions=len(texts),
        image_to_text=recall_from_ranks(ranked_captions, candidates=len(texts)),
        text_to_image=recall_from_ranks(ranked_images, candidates=len(images)),
    )
    correctness = (
        pack_correctness(task, IMAGE_TO_TEXT, ranked_captions[:, 0]),
        pack_correctness(task, TEXT_TO_IMAGE, ranked_images[:, 0]),
    )
    return RetrievalAnswers(score=score, correctness=correctness)


def embed_images(encoder: Encoder, files: Sequence[ImageFile], task: str, reporter: Reporter = SILENT) -> Embeddings:
    """Embed N image files, (N, D), of which few are decoded at once if they are large.

    Args:
        task: its name, for errors, and as the stage of the progress.
    """
    if not files:
        raise InputError(f"The task {task!r} has no images.")

    def embed(batch: slice) -> Embeddings:
        rows, opened = [], map(open_image, files[batch])
        for images in in_bounded_batches(opened, BATCH_SIZE):
            rows.append(encoder.encode_images(images))
            del images  # before the next are opened
        reporter.update(task, batch.stop, len(files))
        return np.concatenate(rows)

    return embed_batches(encoder, in_batches(len(files), BATCH_SIZE), embed)
