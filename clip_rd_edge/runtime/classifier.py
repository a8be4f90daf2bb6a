"""Zero-shot classification with any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from clip_rd_edge.contract.encoder import Embeddings, Encoder, Probabilities, greatest, label_embeddings, probabilities
from clip_rd_edge.contract.label_bank import LabelBank
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.runtime.labels import label_set_key, read_label_set, write_label_set


class Prediction(NamedTuple):
    """A label and its probability among the labels asked for."""

    label: str
    probability: float


class ZeroShotClassifier:
    """Tells which of some labels fits a picture.

    Args:
        encoder: any `Encoder`, such as what `clip_rd_edge.runtime.load` returns.
        labels: names; None takes the bundle's label bank. Labels that the bank has are looked up there, and the text
            tower is not even loaded where it has them all.
        templates: prompts with one `{}`; None takes the model's own. Other templates than the model's pass by the bank.
        none_below: labels less likely than this, between 0 and 1, are not given as an answer: a picture with no
            likelier one shows none of them. A softmax over a single label is always 1, so that it takes two at least.
        cache: keep the embeddings of a bundle's labels in the user's cache folder (`label_cache`), so that the next
            program with the same labels does not load the text tower. False where labels change all the time.

    Raises:
        InputError: no labels, an empty one, or a template without `{}`.
        UsageError: `none_below` is not between 0 and 1.
    """

    def __init__(
        self,
        encoder: Encoder,
        labels: Sequence[str] | None = None,
        *,
        templates: Sequence[str] | None = None,
        none_below: float = 0.0,
        cache: bool = True,
    ) -> None:
        if not 0 <= none_below <= 1:
            raise UsageError(f"none_below is {none_below}; expected a probability between 0 and 1.")
        self.encoder = encoder
        self.none_below = none_below
        description = encoder.describe()
        self._logit_scale = description.logit_scale
        self._templates = tuple(templates or description.templates)
        bank: LabelBank | None = getattr(encoder, "label_bank", None)
        self._bank = bank if self._templates == description.templates else None
        self._text_key: str = getattr(encoder, "text_key", "") if cache else ""
        self._known: dict[str, Embeddings] = {}
        self.labels: tuple[str, ...] = ()
        self._embeddings: Embeddings
        self.set_labels(labels)

    def set_labels(self, labels: Sequence[str] | None) -> None:
        """Change the labels; repeated ones count once, and only new ones go through the text tower."""
        if labels is None:
            if self._bank is None:
                raise InputError(
                    "No labels were given, and the bundle has no label bank.",
                    hint='give some: --labels "a cat" "a dog"',
                )
            self.labels, self._embeddings = self._bank.names, self._bank.embeddings
            return
        unique = tuple(dict.fromkeys(labels))
        rows = {name: i for i, name in enumerate(self._bank.names)} if self._bank else {}
        if self._bank and unique and all(label in rows for label in unique):
            self._embeddings = self._bank.embeddings[[rows[label] for label in unique]]
        else:
            self._embeddings = self._embed(unique)
        self.labels = unique

    def probabilities(self, images: Sequence[Image.Image]) -> Probabilities:
        """Probability of each label for each RGB picture, (N, C)."""
        return probabilities(self.encoder.encode_images(images), self._embeddings, self._logit_scale)

    def classify(self, images: Sequence[Image.Image], *, top: int = 5) -> list[list[Prediction]]:
        """The `top` likeliest labels of each picture, likeliest first; none where all are below `none_below`."""
        return self.classify_embeddings(self.encoder.encode_images(images), top=top)

    def classify_embeddings(self, embeddings: Embeddings, *, top: int = 5) -> list[list[Prediction]]:
        """As `classify`, for pictures that were embedded already, (N, D)."""
        likely = probabilities(embeddings, self._embeddings, self._logit_scale)
        return [
            [Prediction(self.labels[i], float(row[i])) for i in greatest(row, top) if row[i] >= self.none_below]
            for row in likely
        ]

    def _embed(self, labels: Sequence[str]) -> Embeddings:
        """Embeddings by the text tower, (C, D); it sees only labels that it was not asked for by the last call."""
        new = [label for label in labels if label not in self._known]
        if new or not labels:
            self._known.update(self._stored(labels) or self._embed_new(labels, new))
        # What is no longer among the labels is forgotten: a page whose labels change all day shall not grow.
        self._known = {label: self._known[label] for label in labels}
        return np.stack(list(self._known.values()))

    def _stored(self, labels: Sequence[str]) -> dict[str, Embeddings]:
        """The labels' embeddings from the cache, or nothing."""
        if not self._text_key:
            return {}
        rows = read_label_set(label_set_key(self._text_key, labels, self._templates), count=len(labels))
        return {} if rows is None else dict(zip(labels, rows, strict=True))

    def _embed_new(self, labels: Sequence[str], new: Sequence[str]) -> dict[str, Embeddings]:
        """The embeddings of those labels that are new; with the others' they go into the cache."""
        found = dict(zip(new, label_embeddings(self.encoder, new, self._templates), strict=True))
        if self._text_key:
            rows = np.stack([found[label] if label in found else self._known[label] for label in labels])
            write_label_set(label_set_key(self._text_key, labels, self._templates), rows)
        return found
