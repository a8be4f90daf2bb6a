"""Zero-shot classification with any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from clip_rd_edge.contract.bundle import LabelBank
from clip_rd_edge.contract.encoder import Embeddings, Encoder
from clip_rd_edge.contract.zero_shot import Probabilities, label_embeddings, probabilities
from clip_rd_edge.errors import InputError


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

    Raises:
        InputError: no labels, an empty one, or a template without `{}`.
    """

    def __init__(
        self, encoder: Encoder, labels: Sequence[str] | None = None, *, templates: Sequence[str] | None = None
    ) -> None:
        self.encoder = encoder
        description = encoder.describe()
        self._logit_scale = description.logit_scale
        self._templates = tuple(templates or description.templates)
        bank: LabelBank | None = getattr(encoder, "label_bank", None)
        self._bank = bank if self._templates == description.templates else None
        self.labels: tuple[str, ...] = ()
        self._embeddings: Embeddings
        self.set_labels(labels)

    def set_labels(self, labels: Sequence[str] | None) -> None:
        """Change the labels; repeated ones count once."""
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
            self._embeddings = label_embeddings(self.encoder, unique, self._templates)
        self.labels = unique

    def probabilities(self, images: Sequence[Image.Image]) -> Probabilities:
        """Probability of each label for each RGB picture, (N, C)."""
        return probabilities(self.encoder.encode_images(images), self._embeddings, self._logit_scale)

    def classify(self, images: Sequence[Image.Image], *, top: int = 5) -> list[list[Prediction]]:
        """The `top` likeliest labels of each picture, likeliest first."""
        answers = []
        for row in self.probabilities(images):
            best = np.argsort(-row, kind="stable")[:top]
            answers.append([Prediction(self.labels[i], float(row[i])) for i in best])
        return answers
