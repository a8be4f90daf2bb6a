"""Zero-shot classification: label names to classifier weights, similarities to probabilities (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.encoder import Embeddings, Encoder
from clip_rd_edge.errors import InputError

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
