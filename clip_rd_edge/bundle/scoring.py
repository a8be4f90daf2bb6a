"""How cosine similarities become probabilities, from the model over its bundle to every client."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from clip_rd_edge.errors import NotFiniteError
from clip_rd_edge.utils.structs import CheckedStruct, PositiveFloat

Probabilities = npt.NDArray[np.float32]
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
