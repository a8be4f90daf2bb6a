"""What every model looks like from outside, whichever runtime it lives in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_rd_edge.contract.preprocess import Preprocessing
from clip_rd_edge.errors import InputError

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


Probabilities = npt.NDArray[np.float32]


def label_embeddings(encoder: Encoder, labels: Sequence[str], templates: Sequence[str]) -> Embeddings:
    """One embedding a label, shape (C, D): the normalised mean of its embeddings over all templates.

    Args:
        labels: names, such as `cat`.
        templates: prompts with one `{}` for the name (or `{c}`, as CLIP_benchmark writes it), such as
            `a photo of a {}.`

    Raises:
        InputError: no label, an empty label, or a template without a place for the name.
    """
    if not labels:
        raise InputError("No labels were given.", hint='give some: --labels "a cat" "a dog"')
    if empty := [i for i, label in enumerate(labels) if not label.strip()]:
        raise InputError(f"Label {empty[0] + 1} of {len(labels)} is empty.")
    prompts = [fill_template(template, label) for label in labels for template in templates]
    embeddings = encoder.encode_texts(prompts).reshape(len(labels), len(templates), -1)
    return normalise(embeddings.mean(axis=1))


def fill_template(template: str, label: str) -> str:
    """The prompt for a label. str.replace, not str.format: a label may hold braces.

    Raises:
        InputError: the template has no place for the name.
    """
    place = "{c}" if "{c}" in template else "{}"
    if place not in template:
        raise InputError(f"The template {template!r} has no {{}} for the label's name.")
    return template.replace(place, label)


def normalise(rows: npt.NDArray[np.floating]) -> Embeddings:
    """Rows divided by their L2 norm, float32."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    normalised: Embeddings = (rows / np.maximum(norms, 1e-12)).astype(np.float32)
    return normalised


def probabilities(images: Embeddings, labels: Embeddings, logit_scale: float) -> Probabilities:
    """Softmax over labels of the scaled cosine similarities, shape (N, C)."""
    logits = logit_scale * (images @ labels.T)
    logits -= logits.max(axis=1, keepdims=True)
    exponents = np.exp(logits)
    result: Probabilities = (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)
    return result
