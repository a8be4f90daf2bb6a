"""What every model looks like from outside, whichever runtime it lives in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_rd_edge.contract.preprocess import Preprocessing

Embeddings = npt.NDArray[np.float32]


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What an encoder says of itself.

    Attributes:
        runtime: what runs it: `torch`, `onnxruntime`, …
        device: what it computes on, such as `cpu`, or `cuda + cpu` where its towers differ.
        precision: of its image tower and its text tower, such as `fp32` or `int8 + fp32`.
        logit_scale: what cosine similarities are multiplied with before a softmax.
        parameters: number of weights, 0 where unknown.
        size_bytes: on disk, all that is needed to run it.
    """

    name: str
    runtime: str
    precision: str
    embedding_size: int
    preprocessing: Preprocessing
    logit_scale: float
    templates: tuple[str, ...] = ("{}",)
    parameters: int = 0
    size_bytes: int = 0
    device: str = "cpu"


@runtime_checkable
class Encoder(Protocol):
    """Pictures and texts to embeddings: float32, L2-normalised rows, shape (N, D)."""

    def describe(self) -> Description:
        """What this encoder is."""
        ...

    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        """Embed RGB pictures of any size, shape (N, D)."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts as they stand, without templates, shape (N, D)."""
        ...


def in_batches(count: int, batch_size: int) -> list[slice]:
    """Slices that cut `count` items into batches; the last may be smaller."""
    return [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def greatest(values: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Indices of the `count` greatest of values, (N,), greatest first, the earlier of equals first."""
    if count < len(values):
        # Sorting a thousand labels takes longer than a small tower takes for the picture; finding the few does not.
        least = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= least)
    else:
        candidates = np.arange(len(values))
    best: npt.NDArray[np.intp] = candidates[np.argsort(-values[candidates], kind="stable")[:count]]
    return best


@runtime_checkable
class TowerEncoder(Encoder, Protocol):
    """An encoder whose towers can be timed apart from preprocessing and tokenising."""

    def encode_pixels(self, pixels: npt.NDArray[np.float32]) -> Embeddings:
        """Embed preprocessed pictures, (N, 3, H, W) to (N, D)."""
        ...

    def tokenize(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Texts as token ids, (N, T)."""
        ...

    def encode_ids(self, ids: npt.NDArray[np.int64]) -> Embeddings:
        """Embed tokenised texts, (N, T) to (N, D)."""
        ...
