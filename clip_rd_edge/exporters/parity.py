"""How well two sets of embeddings of the same things agree. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.errors import UsageError

Rows = npt.NDArray[np.float64]
Answers = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Agreement:
    """Of N embeddings with N others.

    Attributes:
        max_difference: greatest absolute difference of an entry.
        cosine: mean cosine of embedding to embedding.
        centred_cosine: the same after each side's mean embedding is taken away. CLIP embeddings share a large mean,
            so that raw cosine stays near 1 even where a tower has collapsed to that mean.
        samples: N.
    """

    max_difference: float
    cosine: float
    centred_cosine: float
    samples: int


def agreement(reference: Embeddings, other: Embeddings) -> Agreement:
    """Compare two sets of embeddings, both (N, D), row by row.

    An embedding that is not finite agrees with nothing: its cosines count as 0 and the greatest difference is infinite.

    Raises:
        UsageError: the shapes differ, or N is below 2, where nothing is left when the mean is taken away.
    """
    if reference.shape != other.shape or reference.ndim != 2 or len(reference) < 2:
        raise UsageError(
            f"Embeddings of shapes {reference.shape} and {other.shape} cannot be compared; "
            "expected the same (N, D) with N of 2 or more."
        )
    # float16 overflow and bad scales give NaN, which would otherwise pass every `<` that guards a threshold.
    if not (np.isfinite(reference).all() and np.isfinite(other).all()):
        return Agreement(float("inf"), 0.0, 0.0, len(reference))
    a, b = reference.astype(np.float64), other.astype(np.float64)
    return Agreement(
        max_difference=float(np.abs(a - b).max()),
        cosine=_mean_cosine(a, b),
        centred_cosine=_mean_cosine(a - a.mean(axis=0), b - b.mean(axis=0)),
        samples=len(a),
    )


def matched(pictures: Embeddings, captions: Embeddings) -> Answers:
    """Which of N pictures have their own caption nearest among all N: both (N, D), row by row a pair.

    A caption that another pair has, too, counts as either's own.
    """
    similarities = pictures.astype(np.float64) @ captions.astype(np.float64).T
    own = np.diagonal(similarities)
    right: Answers = own >= similarities.max(axis=1) - 1e-6  # rounding sets equal captions apart
    return right


def _mean_cosine(a: Rows, b: Rows) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean(np.sum(a * b, axis=1) / np.maximum(norms, 1e-24)))
