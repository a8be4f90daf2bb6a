"""Evaluate an encoder on a task: its score, and its prediction for every example, which runs are compared by.

From the predictions also come the sample images of the report, and the classes of lowest accuracy.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.benchmarking.metrics import (
    CHUNK,
    DRAWS,
    ClassScore,
    Hits,
    RetrievalScore,
    Score,
    ShotScore,
    ZeroShotScore,
    accuracy_interval,
    average_precision,
    calibration_error,
    class_scores,
    hidden_score,
    mean_per_class,
    nearest_indices,
    over_draws,
    recall_from_ranks,
)
from clip_rd_edge.bundle.encoder import (
    UNCALIBRATED,
    Embeddings,
    Encoder,
    Scoring,
    embeds_texts,
    in_batches,
    label_embeddings,
    paired,
)
from clip_rd_edge.bundle.images import ImageFile, in_bounded_batches, open_image
from clip_rd_edge.bundle.labels import Taught, background_nouns
from clip_rd_edge.data.folders import CLASS_NAMES
from clip_rd_edge.data.shard_files import TarMember
from clip_rd_edge.data.tasks import RetrievalTask, Task, ZeroShotTask
from clip_rd_edge.errors import InputError
from clip_rd_edge.runtime.labels import NO_LABELS
from clip_rd_edge.runtime.taught import nothing_taught, taught_bank
from clip_rd_edge.utils.paths import is_file
from clip_rd_edge.utils.text import SILENT, Reporter

TOP1, IMAGE_TO_TEXT, TEXT_TO_IMAGE = "top-1", "image → text, R@1", "text → image, R@1"
BATCH_SIZE = 64
_SHOWN_FOLDERS = 3


class Correctness(msgspec.Struct, frozen=True, kw_only=True):
    """Which of a task's N examples a model got right.

    Attributes:
        measure: what counts as right: TOP1, IMAGE_TO_TEXT or TEXT_TO_IMAGE.
        bits: N bits, the first one in the highest bit of the first byte.
        questions: a digest of the labels or captions and their assignment to images; only models with the same digest
            can be compared in pairs.
        images: a digest of the images' names and sizes.
    """

    task: str
    measure: str
    count: int
    bits: bytes
    questions: str
    images: str

    def hits(self) -> Hits:
        """Return one boolean per example, (N,)."""
        return np.unpackbits(np.frombuffer(self.bits, dtype=np.uint8), count=self.count).astype(np.bool_)


class ZeroShotPredictions(msgspec.Struct, frozen=True, kw_only=True):
    """An encoder's predictions for N images, and their score.

    Attributes:
        labels: index of the predicted label of each image.
        probabilities: probability of each predicted label.
    """

    score: ZeroShotScore
    labels: tuple[int, ...]
    probabilities: tuple[float, ...]

    def hits(self, task: ZeroShotTask) -> Hits:
        """Return whether each image was classified correctly, (N,)."""
        hits: Hits = np.asarray(self.labels) == np.asarray(task.targets)
        return hits


class RetrievalPredictions(msgspec.Struct, frozen=True, kw_only=True):
    """An encoder's retrieval score, and which image and caption queries had a positive at rank 1."""

    score: RetrievalScore
    correctness: tuple[Correctness, ...]


Predictions = ZeroShotPredictions | RetrievalPredictions


def pack_correctness(task: Task, measure: str, hits: Hits) -> Correctness:
    """Pack N hits into bits."""
    # Image paths are left out: the same data set may be in another folder on another machine.
    content = (task.captions, task.caption_images) if isinstance(task, RetrievalTask) else (task.labels, task.targets)
    return Correctness(
        task=task.name,
        measure=measure,
        count=len(hits),
        bits=np.packbits(hits).tobytes(),
        questions=hashlib.sha256(repr(content).encode()).hexdigest()[:16],
        images=image_digest(task)[:16],
    )


def correctness_of(task: Task, predictions: Predictions) -> tuple[Correctness, ...]:
    """Return which examples of the task were right, once per measure."""
    if isinstance(predictions, RetrievalPredictions):
        return predictions.correctness
    assert isinstance(task, ZeroShotTask)
    return (pack_correctness(task, TOP1, predictions.hits(task)),)


def image_digest(task: Task) -> str:
    """Return a digest of the names and sizes of a task's images, wherever they lie."""
    return hashlib.sha256(repr(_names_and_sizes(task)).encode()).hexdigest()


def task_fingerprint(task: Task) -> str:
    """Return a SHA-256 of a task's questions and images, wherever they lie; no image is read."""
    return hashlib.sha256(repr((_names_and_sizes(task), task.questions)).encode()).hexdigest()


def _names_and_sizes(task: Task) -> list[tuple[str, int]]:
    """Return the name of each of a task's images, and its size in bytes, which is 0 where it is unknown."""

    def size(image: ImageFile) -> int:
        if isinstance(image, TarMember):
            return image.size
        return image.stat().st_size if isinstance(image, Path) and is_file(image) else 0

    return [(Path(str(image)).name, size(image)) for image in task.images]


def evaluate(
    encoder: Encoder,
    task: Task,
    *,
    per_class: bool = False,
    matches: bool = False,
    shots: int = 0,
    reporter: Reporter = SILENT,
) -> Score:
    """Score an encoder on a task of either kind.

    Args:
        per_class: fill in `ZeroShotScore.per_class`.
        matches, shots: as for `predict`.
    """
    predictions = predict(encoder, task, matches=matches, shots=shots, reporter=reporter)
    if not (per_class and isinstance(task, ZeroShotTask) and isinstance(predictions, ZeroShotPredictions)):
        return predictions.score
    predicted, targets = np.asarray(predictions.labels), np.asarray(task.targets)
    scores = class_scores(predicted, targets, task.labels, task.folders)
    return msgspec.structs.replace(predictions.score, per_class=scores)


def note_class_names(tasks: Sequence[Task], reporter: Reporter) -> None:
    """Report which folders got which names from a classnames.txt: its order may differ from the folders'."""
    for task in tasks:
        if isinstance(task, ZeroShotTask) and task.folders:
            named = [f"{folder} → {label}" for folder, label in zip(task.folders, task.labels, strict=True)]
            if len(named) > _SHOWN_FOLDERS:
                named = [*named[: _SHOWN_FOLDERS - 1], "…", named[-1]]  # by the last, a name that is missing shows
            reporter.note(f"{task.name}: {CLASS_NAMES} names the folders: {', '.join(named)}")


def predict(
    encoder: Encoder, task: Task, *, matches: bool = False, shots: int = 0, reporter: Reporter = SILENT
) -> Predictions:
    """Return an encoder's predictions on a task of either kind.

    Args:
        matches: fill in `ZeroShotScore.hidden` and `mean_average_precision`, for which common nouns are embedded.
        shots: fill in `ZeroShotScore.over_shots`, up to so many images of each label.
    """
    if isinstance(task, ZeroShotTask):
        return zero_shot(encoder, task, matches=matches, shots=shots, reporter=reporter)
    return retrieval(encoder, task, reporter=reporter)


def zero_shot(
    encoder: Encoder, task: ZeroShotTask, *, matches: bool = False, shots: int = 0, reporter: Reporter = SILENT
) -> ZeroShotPredictions:
    """Classify a task's images zero-shot among its labels.

    Args:
        matches, shots: as for `predict`.
        reporter: receives the progress after each batch, with the task's name as the stage.
    """
    labels = label_embeddings(encoder, task.labels, task.templates)
    images = embed_images(encoder, task.images, task.name, reporter)
    description = encoder.describe()
    calibrated = (description.calibration or UNCALIBRATED).softened(description.scoring)
    confidence, ranked = _classify(images, labels, calibrated)
    targets = np.asarray(task.targets, dtype=np.int64)
    hits = ranked[:, 0] == targets
    origin = (str(len(task.templates)), task.templates_from)
    score = ZeroShotScore(
        task=task.name,
        images=len(targets),
        classes=len(task.labels),
        top1=float(hits.mean()),
        top1_interval=accuracy_interval(hits),
        top5=float((ranked == targets[:, None]).any(axis=1).mean()) if len(task.labels) >= 5 else None,
        mean_per_class=mean_per_class(hits, targets),
        templates=task.templates[0] if len(task.templates) == 1 else ", ".join(filter(None, origin)),
        calibration_error=calibration_error(confidence, hits),
        over_shots=_over_shots(encoder, task, images, labels, calibrated, most=shots, reporter=reporter),
    )
    if matches and (nouns := _background(encoder)) is not None:
        found = np.concatenate(
            [description.scoring.matches(images[chunk], labels, nouns) for chunk in in_batches(len(images), CHUNK)]
        )
        score = msgspec.structs.replace(
            score,
            hidden=hidden_score(found, targets),
            mean_average_precision=average_precision(found, targets[:, None] == np.arange(len(task.labels))),
        )
    return ZeroShotPredictions(
        score=score, labels=tuple(ranked[:, 0].tolist()), probabilities=tuple(confidence.astype(float).tolist())
    )


def _over_shots(
    encoder: Encoder,
    task: ZeroShotTask,
    images: Embeddings,
    texts: Embeddings,
    scoring: Scoring,
    *,
    most: int,
    reporter: Reporter,
) -> tuple[ShotScore, ...]:
    """Return the accuracy after 0, 1, 2, 4, … images of each label have taught it, on those beyond the last number.

    Args:
        images, texts: (N, D) and (C, D).
        most: largest number of images; at most half of those of the rarest label are used. 0 measures nothing.
    """
    targets = np.asarray(task.targets)
    sizes = np.bincount(targets, minlength=len(task.labels))
    steps = [0, *(1 << power for power in range(most.bit_length()) if 1 << power <= sizes.min() // 2)]
    if len(steps) == 1:
        if most:
            reporter.note(f"{task.name}: accuracy over shots needs two images of each label; one has {sizes.min()}")
        return ()
    start, own = nothing_taught(encoder), np.zeros(len(texts), np.bool_)
    place = np.arange(len(targets)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of an image among its label's
    found: dict[int, list[float]] = {step: [] for step in steps}
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(targets))
        order = order[np.argsort(targets[order], kind="stable")]  # each label's images together, at random
        asked = order[place >= steps[-1]]
        for step, values in found.items():
            rows = texts
            if step:
                chosen = order[place < step]
                shown = np.concatenate([start.images, images[chosen].astype(np.float16)])
                classes = np.concatenate([start.classes, targets[chosen].astype(np.int32)])
                taught = Taught(task.labels, texts[:, : images.shape[1]], own, shown, classes, "")
                rows = taught_bank(taught, NO_LABELS, scoring)[0].embeddings
            values.append(float((nearest_indices(paired(images[asked], rows), rows, 1)[:, 0] == targets[asked]).mean()))
    means = ((step, *over_draws(values)) for step, values in found.items())
    return tuple(ShotScore(shots=step, top1=mean, top1_interval=interval) for step, mean, interval in means)


_BACKGROUNDS: WeakKeyDictionary[Encoder, Embeddings] = WeakKeyDictionary()


def _background(encoder: Encoder) -> Embeddings | None:
    """Return the embeddings of common nouns, once per encoder; None if it has neither these nor a text tower."""
    stored: Embeddings | None = getattr(encoder, "background", None)
    if stored is not None or not embeds_texts(encoder):
        return stored
    if encoder not in _BACKGROUNDS:
        templates = encoder.describe().templates
        _BACKGROUNDS[encoder] = label_embeddings(encoder, background_nouns(), templates, by_text=True)
    return _BACKGROUNDS[encoder]


def _classify(
    images: Embeddings, labels: Embeddings, scoring: Scoring
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return the probability of each image's first label, (N,), and its first five labels, (N, min(5, C)).

    Only the similarities of CHUNK images at once are in memory.
    """
    images = paired(images, labels)
    # Ranked by similarity, not by probability: a softmax in float32 turns small differences into ties.
    ranked = nearest_indices(images, labels, 5)
    confidence = [
        np.take_along_axis(scoring.probabilities(images[chunk], labels), ranked[chunk, :1], axis=1)[:, 0]
        for chunk in in_batches(len(images), CHUNK)
    ]
    return np.concatenate(confidence), ranked


def retrieval(encoder: Encoder, task: RetrievalTask, *, reporter: Reporter = SILENT) -> RetrievalPredictions:
    """Retrieve in both directions, with all captions of each image."""
    images = embed_images(encoder, task.images, task.name, reporter)
    texts = encoder.encode_texts(task.captions)
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
    return RetrievalPredictions(score=score, correctness=correctness)


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

    return np.concatenate([embed(batch) for batch in in_batches(len(files), BATCH_SIZE)])


SAMPLES_PER_OUTCOME = 6  # correct ones, and as many wrong ones
MAX_WORST_CLASSES = 6
_THUMBNAIL_EDGE = 128  # max pixels


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """A row's prediction for one image: its label, its probability, and whether it is correct (`right`)."""

    row: str
    label: str
    probability: float
    right: bool


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """An image (a small PNG), its true label, and the predictions of some models."""

    task: str
    png: bytes
    label: str
    predictions: tuple[Prediction, ...]


def choose_samples(task: ZeroShotTask, predictions: Mapping[str, ZeroShotPredictions]) -> tuple[Sample, ...]:
    """Sample images at random: up to SAMPLES_PER_OUTCOME that the last row got right, then as many that it got wrong.

    Args:
        predictions: those that are shown, by row label.
    """
    hits = list(predictions.values())[-1].hits(task)
    rng = np.random.default_rng(0)
    indices: list[int] = []
    for candidates in (np.flatnonzero(hits), np.flatnonzero(~hits)):
        indices += rng.permutation(candidates)[:SAMPLES_PER_OUTCOME].tolist()

    def prediction(row: str, index: int) -> Prediction:
        label, probability = predictions[row].labels[index], predictions[row].probabilities[index]
        right = label == task.targets[index]
        return Prediction(row=row, label=task.labels[label], probability=probability, right=right)

    return tuple(
        Sample(
            task=task.name,
            png=_thumbnail(task.images[index]),
            label=task.labels[task.targets[index]],
            predictions=tuple(prediction(row, index) for row in predictions),
        )
        for index in indices
    )


def worst_classes(task: ZeroShotTask, predictions: ZeroShotPredictions) -> tuple[ClassScore, ...]:
    """Return up to MAX_WORST_CLASSES classes of lowest recall.

    Classes without errors are left out, and those of a single image, whose recall is all or nothing.
    """
    predicted, targets = np.asarray(predictions.labels), np.asarray(task.targets)
    scores = class_scores(predicted, targets, task.labels)
    wrong = [score for score in scores if score.images > 1 and score.recall is not None and score.recall < 1]
    return tuple(sorted(wrong, key=lambda score: score.recall or 0)[:MAX_WORST_CLASSES])


def _thumbnail(file: ImageFile) -> bytes:
    """Return a small PNG of an image file."""
    image = open_image(file).copy()
    image.thumbnail((_THUMBNAIL_EDGE, _THUMBNAIL_EDGE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
