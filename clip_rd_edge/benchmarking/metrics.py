"""The metrics as arithmetic on arrays, defined as CLIP_benchmark defines them.

CLIP_benchmark: https://github.com/LAION-AI/CLIP_benchmark, `metrics/zeroshot_classification.py` and
`metrics/zeroshot_retrieval.py`. Scores are fractions in [0, 1]. Equal similarities rank in the order of their index, so
that a result is the same on every machine.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

Similarities = npt.NDArray[np.float32]
Hits = npt.NDArray[np.bool_]
RESAMPLES = 10_000
_CHUNK = 256  # rows ranked at once: (256, 50,000) indices are 100 MB


class Interval(msgspec.Struct, frozen=True):
    """A 95 % interval."""

    low: float
    high: float


class ZeroShotScore(msgspec.Struct, frozen=True, kw_only=True, tag="zero-shot", tag_field="kind"):
    """How well pictures were told among labels.

    Attributes:
        top1, top5: part of the pictures whose label is the best, among the best five; top5 is None below five labels.
        top1_interval: by bootstrap over pictures.
        mean_per_class: top-1 of each class that has pictures, averaged.
        calibration_error: how far the probability of an answer is from how often such answers are right, on average;
            None in results of format version 1.
        templates: what prompts the labels were put into, such as `80, ImageNet's, from open_clip`.
    """

    task: str
    images: int
    classes: int
    top1: float
    top1_interval: Interval
    top5: float | None
    mean_per_class: float
    templates: str = ""
    calibration_error: float | None = None


class Recall(msgspec.Struct, frozen=True, kw_only=True):
    """Part of the queries with a right answer among the best 1, 5, 10; None where there are fewer candidates."""

    at1: float
    at5: float | None
    at10: float | None


class RetrievalScore(msgspec.Struct, frozen=True, kw_only=True, tag="retrieval", tag_field="kind"):
    """How well pictures and captions find each other.

    Attributes:
        image_to_text: a picture finds any of its captions.
        text_to_image: a caption finds its picture.
    """

    task: str
    images: int
    captions: int
    image_to_text: Recall
    text_to_image: Recall


Score = ZeroShotScore | RetrievalScore


def best(similarities: Similarities, k: int) -> npt.NDArray[np.int64]:
    """Indices of the k greatest entries of each row, greatest first, (N, C) to (N, min(k, C))."""
    parts = [
        np.argsort(-similarities[start : start + _CHUNK], axis=1, kind="stable")[:, :k]
        for start in range(0, len(similarities), _CHUNK)
    ]
    return np.concatenate(parts)


def top_k(ranked: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], k: int) -> float:
    """Part of the N rows whose target is among the first k of `ranked`, (N, ≥ k)."""
    return float((ranked[:, :k] == targets[:, None]).any(axis=1).mean())


def mean_per_class(hits: Hits, targets: npt.NDArray[np.int64]) -> float:
    """Mean over the classes that occur in `targets` of each one's part of hits (balanced accuracy)."""
    counts = np.bincount(targets)
    present = counts > 0
    return float((np.bincount(targets, weights=hits)[present] / counts[present]).mean())


def calibration_error(confidence: npt.NDArray[np.floating], hits: Hits, *, bins: int = 15) -> float:
    """Expected calibration error of N answers (Guo et al. 2017, equation 3), with bins of equal width.

    Answers are put into bins by their confidence; of each bin, mean confidence and part of hits differ by so much, and
    the error is the mean over bins, weighted by their answers.
    """
    bin_of = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(bin_of, weights=confidence - hits, minlength=bins)
    return float(np.abs(gaps).sum() / len(hits))


def found_among_best(similarities: Similarities, positive: Hits) -> Hits:
    """Whether each of the best 10 of M candidates is a right one, (N, M) twice to (N, min(10, M)), best first."""
    found: Hits = np.take_along_axis(positive, best(similarities, 10), axis=1)
    return found


def recall_of(found: Hits, *, candidates: int) -> Recall:
    """Recall of N queries by what `found_among_best` tells: a query counts once, however many positives it found."""
    at = {k: float(found[:, :k].any(axis=1).mean()) if candidates >= k else None for k in (5, 10)}
    return Recall(at1=float(found[:, 0].mean()), at5=at[5], at10=at[10])


def recall(similarities: Similarities, positive: Hits) -> Recall:
    """Recall of N queries over M candidates, both (N, M)."""
    return recall_of(found_among_best(similarities, positive), candidates=similarities.shape[1])


def hit_interval(hits: Hits, *, seed: int = 0) -> Interval:
    """95 % percentile bootstrap interval of the mean of N hits.

    N draws with replacement from hits and misses hold Binomial(N, mean) hits: drawing that number is the bootstrap,
    without its loop.
    """
    count = len(hits)
    means = np.random.default_rng(seed).binomial(count, hits.mean(), RESAMPLES) / count
    return _percentiles(means)


def difference_interval(hits: Hits, reference: Hits, *, seed: int = 0, level: float = 0.95) -> Interval:
    """Percentile bootstrap interval of mean(hits) − mean(reference), paired picture by picture.

    Most pictures are easy or hard for both models; pairing takes that out, so that small differences can be told.
    """
    count = len(hits)
    won, lost = (hits & ~reference).mean(), (reference & ~hits).mean()
    draws = np.random.default_rng(seed).multinomial(count, [won, lost, 1 - won - lost], RESAMPLES)
    return _percentiles((draws[:, 0] - draws[:, 1]) / count, level=level)


def _percentiles(means: npt.NDArray[np.float64], *, level: float = 0.95) -> Interval:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def primary_metric(score: Score) -> float:
    """The one figure of a score: top-1 accuracy, or how often an image finds its caption first."""
    return score.top1 if isinstance(score, ZeroShotScore) else score.image_to_text.at1
