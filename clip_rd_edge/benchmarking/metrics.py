"""Accuracy metrics as functions of arrays, with CLIP_benchmark's definitions.

CLIP_benchmark: https://github.com/LAION-AI/CLIP_benchmark, `metrics/zeroshot_classification.py` and
`metrics/zeroshot_retrieval.py`. Scores are fractions in [0, 1]. Ties in similarity are broken by index, so that results
are the same on every machine.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.encoder import Embeddings, in_batches
from clip_rd_edge.utils.timing import sign_test

Similarities = npt.NDArray[np.float32]
Hits = npt.NDArray[np.bool_]
RESAMPLES = 10_000
_Z = 1.959964  # standard deviations of a 95 % interval
CHUNK = 256  # rows ranked at once: (256, 50,000) indices are 100 MB


class Interval(msgspec.Struct, frozen=True):
    """A confidence interval; 95 % unless stated otherwise."""

    low: float
    high: float


class ClassScore(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Zero-shot classification accuracy on the images of one class: one row of a confusion matrix.

    Attributes:
        label: name of the class.
        images: number of images of the class.
        recall: fraction of the class's images that are given its label; None without images.
        precision: fraction of the images that are given its label that are of the class; None if there are none.
        predicted: number of the class's images per predicted label, most frequent first.
        folder: name of the folder of its images, if the classes have other names than their folders; else empty.
    """

    label: str
    images: int
    recall: float | None
    precision: float | None
    predicted: dict[str, int]
    folder: str = ""


class HiddenScore(msgspec.Struct, frozen=True, kw_only=True):
    """How well an encoder notices images whose label is not among those it is asked for: half of them, in five draws.

    Attributes:
        auroc, auroc_interval: how often an image whose label is there fits better than one whose label is hidden; 0.5
            is chance. With the 95 % interval of the mean over the draws.
        fpr95: share of the others that are taken for known where 95 % of the known ones are.
    """

    auroc: float
    auroc_interval: Interval
    fpr95: float


class ShotScore(msgspec.Struct, frozen=True, kw_only=True):
    """Top-1 accuracy after `teach` with so many images of each label, on images that it was not taught; five draws.

    Attributes:
        shots: number of images of each label; 0 is zero-shot, on the same images as the others.
        top1, top1_interval: mean over the draws, and its 95 % interval.
    """

    shots: int
    top1: float
    top1_interval: Interval


class ZeroShotScore(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="zero-shot", tag_field="kind"):
    """Zero-shot classification accuracy on one task.

    Attributes:
        top1, top5: fraction of images whose label ranks first, or among the first five; top5 is None with fewer than
            five labels.
        top1_interval: 95 % confidence interval over images.
        mean_per_class: top-1 averaged over the classes that have images.
        calibration_error: mean gap between the probability of a prediction and how often such predictions are correct;
            None if it was not measured.
        templates: the prompt templates of the labels, such as `80, ImageNet's, from open_clip`.
        hidden: see `HiddenScore`; None if it was not measured, or there are fewer than four labels.
        mean_average_precision: how well each label, by itself, ranks its images above the others; None as for `hidden`.
        over_shots: accuracy over the number of images that have taught each label; empty unless requested.
        per_class: one entry per class, in the order of the task's labels; empty unless requested.
    """

    task: str
    images: int
    classes: int
    top1: float
    top1_interval: Interval
    top5: float | None
    mean_per_class: float
    templates: str
    calibration_error: float | None
    hidden: HiddenScore | None = None
    mean_average_precision: float | None = None
    over_shots: tuple[ShotScore, ...] = ()
    per_class: tuple[ClassScore, ...] = ()

    @property
    def auroc(self) -> float | None:
        return self.hidden.auroc if self.hidden else None


class Recall(msgspec.Struct, frozen=True, kw_only=True):
    """Fraction of queries with a positive among the first 1, 5 and 10 results; None with fewer candidates."""

    at1: float
    at5: float | None
    at10: float | None


class RetrievalScore(msgspec.Struct, frozen=True, kw_only=True, tag="retrieval", tag_field="kind"):
    """Image-text retrieval accuracy on one task.

    Attributes:
        image_to_text: recall of image queries; any caption of the image is a positive.
        text_to_image: recall of caption queries; the caption's image is the positive.
    """

    task: str
    images: int
    captions: int
    image_to_text: Recall
    text_to_image: Recall


Score = ZeroShotScore | RetrievalScore


def nearest_indices(queries: Embeddings, candidates: Embeddings, k: int) -> npt.NDArray[np.int64]:
    """Return the indices of the k candidates nearest to each query, (N, D) and (M, D) to (N, min(k, M)).

    Only the similarities of CHUNK queries at once are in memory.
    """
    chunks = (queries[chunk] @ candidates.T for chunk in in_batches(len(queries), CHUNK))
    # Copied, or the indices of all candidates would stay in memory.
    return np.concatenate([np.argsort(-found, axis=1, kind="stable")[:, :k].copy() for found in chunks])


def mean_per_class(hits: Hits, targets: npt.NDArray[np.int64]) -> float:
    """Return the hit rate averaged over the classes that occur in `targets` (balanced accuracy)."""
    counts = np.bincount(targets)
    present = counts > 0
    return float((np.bincount(targets, weights=hits)[present] / counts[present]).mean())


def class_scores(
    predicted: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], labels: Sequence[str], folders: Sequence[str] = ()
) -> tuple[ClassScore, ...]:
    """Return the score of each of C classes from the predicted and true classes of N images, as indices into `labels`.

    Classes of the same name are kept apart, except in `ClassScore.predicted`.

    Args:
        folders: as of `ZeroShotTask`.
    """
    given = np.bincount(predicted, minlength=len(labels))
    scores = []
    for index, label in enumerate(labels):
        answers = Counter(predicted[targets == index].tolist())
        correct, images = answers[index], answers.total()
        by_label: Counter[str] = Counter()
        for answer, count in answers.items():
            by_label[labels[answer]] += count
        scores.append(
            ClassScore(
                label=label,
                images=images,
                recall=correct / images if images else None,
                precision=correct / int(given[index]) if given[index] else None,
                predicted=dict(sorted(by_label.items(), key=lambda item: (-item[1], item[0]))),
                folder=folders[index] if folders else "",
            )
        )
    return tuple(scores)


def calibration_error(confidence: npt.NDArray[np.floating], hits: Hits, *, bins: int = 15) -> float:
    """Return the expected calibration error of N predictions (Guo et al. 2017, equation 3), with bins of equal width.

    Predictions are binned by confidence. The error is the absolute gap between mean confidence and hit rate of each
    bin, averaged over the bins and weighted by their number of predictions.
    """
    bin_indices = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(bin_indices, weights=confidence - hits, minlength=bins)
    return float(np.abs(gaps).sum() / len(hits))


def separation(known: npt.NDArray[np.floating], others: npt.NDArray[np.floating]) -> float:
    """Return the area under the ROC curve: how often a score of N known images exceeds one of M others."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, known, side="left") + np.searchsorted(ordered, known, side="right")
    return float(below.mean() / 2 / len(ordered))


def false_positives(known: npt.NDArray[np.floating], others: npt.NDArray[np.floating]) -> float:
    """Return the share of others whose score is at least the one that 95 % of the known images reach."""
    return float((others >= np.quantile(known, 1 - 0.95)).mean())


DRAWS, _T = 5, 2.776  # of labels that are hidden, or of images to teach; Student's t of a 95 % interval over them


def over_draws(values: Sequence[float]) -> tuple[float, Interval]:
    """Return the mean of the fractions of DRAWS draws, and its 95 % interval."""
    mean, half = float(np.mean(values)), _T * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, Interval(max(0.0, mean - half), min(1.0, mean + half))


def hidden_score(matches: Similarities, targets: npt.NDArray[np.int64]) -> HiddenScore | None:
    """Return how well the best match separates known images from others, with half of the labels hidden in each draw.

    Args:
        matches: of each label for each image, (N, C).
        targets: the index of each image's label, (N,).
    """
    labels, areas, passed = matches.shape[1], [], []
    for draw in range(DRAWS):
        shown = np.random.default_rng(draw).permutation(labels)[: labels // 2]
        known, best = np.isin(targets, shown), matches[:, shown].max(axis=1, initial=-np.inf)
        if labels < 4 or known.all() or not known.any():
            return None
        areas.append(separation(best[known], best[~known]))
        passed.append(false_positives(best[known], best[~known]))
    auroc, interval = over_draws(areas)
    return HiddenScore(auroc=auroc, auroc_interval=interval, fpr95=float(np.mean(passed)))


def average_precision(scores: npt.NDArray[np.floating], fits: Hits) -> float:
    """Return the mean average precision over labels: how well each ranks the images that it fits above the others.

    Labels that fit no image are left out; of equal scores, the images that do not fit come first.

    Args:
        scores, fits: of each label for each image, (N, C).
    """
    values = []
    for column, right in zip(scores.T, fits.T, strict=True):
        if right.any():
            ranked = right[np.lexsort((right, -column))]
            values.append((np.cumsum(ranked) / np.arange(1, len(ranked) + 1))[ranked].mean())
    return float(np.mean(values))


def recall_from_ranks(ranked_positives: Hits, *, candidates: int) -> Recall:
    """Return the recall of N queries; one with several positives counts once.

    Args:
        ranked_positives: whether each of the up to 10 most similar candidates is a positive, most similar first,
            (N, min(10, M)).
        candidates: M, the number of candidates.
    """
    at = {k: float(ranked_positives[:, :k].any(axis=1).mean()) if candidates >= k else None for k in (5, 10)}
    return Recall(at1=float(ranked_positives[:, 0].mean()), at5=at[5], at10=at[10])


def accuracy_interval(hits: Hits) -> Interval:
    """Return the 95 % score interval of the mean of N hits (Wilson 1927).

    Unlike a bootstrap, it has a width where all answers are right, or none is.
    """
    count, mean = len(hits), float(hits.mean())
    middle = (mean + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(mean * (1 - mean) / count + _Z**2 / (4 * count**2))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def difference_interval(hits: Hits, reference: Hits, *, level: float = 0.95) -> Interval:
    """Return the paired percentile bootstrap interval of mean(hits) − mean(reference).

    Most examples are easy or hard for both models. Pairing by example removes that shared variance, so that smaller
    differences become significant.
    """
    count = len(hits)
    won, lost = (hits & ~reference).mean(), (reference & ~hits).mean()
    same = max(0.0, 1 - won - lost)  # rounding may leave less than 0 where no example is alike
    draws = np.random.default_rng(0).multinomial(count, [won, lost, same], RESAMPLES)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / count, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def difference_p_value(hits: Hits, reference: Hits) -> float:
    """Return the p-value of the difference by the exact sign test, two-sided.

    With few changed answers, a bootstrap rarely draws none of them, so that its interval excludes zero too easily.
    """
    won, lost = int((hits & ~reference).sum()), int((reference & ~hits).sum())
    return min(1.0, 2 * sign_test(max(won, lost), min(won, lost)))


def may_be_chance(interval: Interval, p_value: float, *, level: float = 0.95) -> bool:
    """Return whether a difference's interval includes zero, or too few answers changed to tell.

    Args:
        p_value: see `difference_p_value`.
        level: that of the interval.
    """
    return interval.low <= 0 <= interval.high or p_value > 1 - level


def primary_metric(score: Score) -> float:
    """Return the main figure of a score: top-1 accuracy, or image-to-text R@1."""
    return score.top1 if isinstance(score, ZeroShotScore) else score.image_to_text.at1
