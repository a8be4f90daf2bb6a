"""How cosine similarities become probabilities, from the model over its bundle to every client."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from clip_rd_edge.errors import NotFiniteError
from clip_rd_edge.utils.structs import CheckedStruct, PositiveFloat

Probabilities = npt.NDArray[np.float32]
Matches = npt.NDArray[np.float32]
REFUSE_KNOWN = 0.05  # share of images of known things that `none` may refuse
# Limits on what a manifest may say, far above those of any model that open_clip has.
LogitScale = Annotated[PositiveFloat, Meta(le=1e6)]
LogitBias = Annotated[float, Meta(ge=-1e6, le=1e6)]


class Scoring(CheckedStruct, frozen=True):
    """A softmax over the labels, as CLIP was trained, or a sigmoid for each label, as SigLIP was (Zhai et al. 2023).

    Attributes:
        scale: multiplies cosine similarities.
        bias: added to them afterwards, for the sigmoid. None: a softmax, in which a bias would change nothing.
    """

    scale: LogitScale
    bias: LogitBias | None = None

    @property
    def is_independent(self) -> bool:
        """Whether each label has a probability of its own, whatever the others are; they need not add up to 1."""
        return self.bias is not None

    def probabilities(self, images: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> Probabilities:
        """Return the probability of each label for each image, (N, C), from (N, D) and (C, D), or as in `paired`."""
        logits = require_finite(self.scale * (paired(images, labels) @ labels.T), "An image or a label")
        if self.bias is not None:
            sigmoid: Probabilities = np.exp(-np.logaddexp(0, -(logits + self.bias))).astype(np.float32)
            return sigmoid
        logits -= logits.max(axis=1, keepdims=True)
        exponents = np.exp(logits)
        softmax: Probabilities = (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)
        return softmax

    def matches(
        self,
        images: npt.NDArray[np.float32],
        labels: npt.NDArray[np.float32],
        background: npt.NDArray[np.float32],
    ) -> Matches:
        """Return how well each label fits each image, (N, C), whatever the other labels are.

        It is the logarithm of how much likelier the label is than a common noun, by the model's softmax: the score of
        NegLabel (Jiang et al. 2024) for a single label.

        Args:
            images, labels: embeddings, (N, D) and (C, D), or as in `paired`.
            background: embeddings of K common nouns, (K, D), few of which fit any image.
        """
        usual = require_finite(self.scale * (images @ background.T), "An image or the background")
        top = usual.max(axis=1, keepdims=True)
        mean = top + np.log(np.exp(usual - top).mean(axis=1, keepdims=True))
        logits = require_finite(self.scale * (paired(images, labels) @ labels.T), "An image or a label")
        above: Matches = (logits - mean).astype(np.float32)
        return above


_Figure = Annotated[float, Meta(ge=-1e6, le=1e6)]


class Calibration(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What pairs of images and captions show of a model's answers, beside its own `Scoring`.

    A *match* is how well one label fits one image, whatever the other labels are (`Scoring.matches`). An image is
    refused if its best match is below a limit, which depends on the labels: see `limit`.

    Attributes:
        temperature: divides the logits of the softmax (Guo et al. 2017); 1 leaves them as they are.
        slope, intercept: the probability that a label fits is sigmoid(slope · match + intercept) (Platt 1999).
        curve: the match of each pair's image with its own caption; the images' embeddings are in known.npz.
        source: the name of the pairs.
        error, error_before: expected calibration error of the softmax with the temperature and without, as a fraction.
    """

    temperature: Annotated[float, Meta(ge=1e-3, le=1e3)] = 1.0
    slope: _Figure
    intercept: _Figure
    curve: Annotated[tuple[_Figure, ...], Meta(max_length=1_000)] = ()
    source: str = ""
    error: float = 0.0
    error_before: float = 0.0

    def softened(self, scoring: Scoring) -> Scoring:
        """Return the model's scoring with the temperature; a sigmoid, which has a bias of its own, is left as it is."""
        return scoring if scoring.bias is not None else Scoring(scoring.scale / self.temperature)

    def limit(self, best: Matches, refuse_known: float) -> float:
        """Return the match below which an image is refused, for a share of images of known things.

        It is measured among the labels at hand: each pair's image, with its own caption as one more label, is what an
        image of a known thing is. The limit is the k-th smallest of their n best matches, k = ⌊share · (n + 1)⌋, which
        refuses at most this share of new such images on average (split conformal prediction, Vovk et al. 2005).

        Args:
            best: the best match of each pair's image among the labels, (n,).
        """
        rank = math.floor(refuse_known * (len(best) + 1) + 1e-9)
        return float(np.sort(np.maximum(best, self.curve))[rank - 1]) if rank else -math.inf

    def probabilities(self, matches: Matches) -> Probabilities:
        """Return the probability that each label fits each image, by itself."""
        own: Probabilities = np.exp(-np.logaddexp(0, -(self.slope * matches + self.intercept))).astype(np.float32)
        return own


# Of models that were exported without pairs: those of benchmarks/devices/none_of_these.py are within 0.3 of it.
UNCALIBRATED = Calibration(slope=0.97, intercept=-3.3)


def usual_limit(usual: Matches, labels: int) -> Matches:
    """Return the match below which an image is refused without calibration, (N, 1).

    Of so many nouns as there are labels, two would match at least as well.

    Args:
        usual: the matches of the background's nouns, (N, K).
    """
    limit: Matches = np.quantile(usual, 1 - min(0.5, 2 / (labels + 1)), axis=1, keepdims=True).astype(np.float32)
    return limit


def paired(images: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return image embeddings, (N, D), with a 1 at the end if labels are (C, D + 1), whose last entry is an offset."""
    if labels.shape[1] != images.shape[1] + 1:
        return images
    return np.concatenate([images, np.ones((len(images), 1), dtype=np.float32)], axis=1)


def require_finite(embeddings: npt.NDArray[np.float32], source: str) -> npt.NDArray[np.float32]:
    """Return the embeddings if all entries are finite."""
    if not np.isfinite(embeddings).all():
        raise NotFiniteError(
            f"{source} has embeddings with entries that are not finite numbers.",
            hint="the model is damaged, or its precision does not work on this device; check a bundle with "
            "clip-rd-edge verify",
        )
    return embeddings
