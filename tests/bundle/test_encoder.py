"""Zero-shot classification with any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from clip_rd_edge.bundle.encoder import label_embeddings, require_labels, top_indices
from clip_rd_edge.errors import InputError

WORDS = ("red", "green", "blue", "photo", "drawing")


class Counting:
    """Embeds a text as the numbers of its words, not normalised, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def describe(self) -> Any:
        raise NotImplementedError

    encode_images = describe

    def encode_texts(self, texts: Sequence[str]) -> Any:
        self.asked += texts
        rows = np.asarray([[text.split().count(word) for word in WORDS] for text in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_embedding_of_a_label_is_the_mean_of_its_own_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_rd_edge.bundle.encoder._REPORTED_LABELS", 2)
    encoder, templates = Counting(), ["{} {} photo", "a drawing of {c}"]
    rows = label_embeddings(encoder, WORDS[:3], templates)
    expected = np.zeros((3, 5))
    for number in range(3):
        photo, drawing = np.zeros(5), np.zeros(5)
        photo[[number, 3]] = 2 / 5**0.5, 1 / 5**0.5
        drawing[[number, 4]] = 1 / 2**0.5
        expected[number] = (photo + drawing) / np.linalg.norm(photo + drawing)
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    assert sorted(encoder.asked) == sorted(
        prompt for word in WORDS[:3] for prompt in (f"{word} {word} photo", f"a drawing of {word}")
    )


@pytest.mark.parametrize("labels", [[], ["red", " "], ["red", "\ud800"], ["red\0"]])
def test_labels_that_are_none_are_refused(labels: list[str]) -> None:
    with pytest.raises(InputError):
        require_labels(labels)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_largest_values_come_first_and_ties_keep_their_order(count: int) -> None:
    values = np.asarray([3, 9, 3, 1, 9, 3], np.float32)
    assert top_indices(values, count).tolist() == [1, 4, 0, 2, 5, 3][:count]
