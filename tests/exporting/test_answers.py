"""Answers are calibrated on pairs: the temperature, a label's own probability, and what is no calibration at all."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from clip_rd_edge.bundle.encoder import Embeddings, Scoring, normalise
from clip_rd_edge.exporting.calibration import calibrate, expected_error, fit_sigmoid, fit_temperature


def _pairs(count: int, noise: float = 1.0) -> tuple[Embeddings, Embeddings, Embeddings]:
    """Images that resemble their captions, and nouns that have nothing to do with them."""
    rng = np.random.default_rng(0)
    captions, nouns = rng.standard_normal((count, 16)), rng.standard_normal((200, 16))
    images = captions + noise * rng.standard_normal((count, 16))
    return normalise(images), normalise(captions), normalise(nouns)


def test_the_temperature_is_the_one_that_the_answers_were_drawn_with() -> None:
    rng, lists = np.random.default_rng(0), []
    for size in (5, 20):
        logits = rng.normal(0, 4, (4000, size))
        answers = (logits / 2.5 + rng.gumbel(size=logits.shape)).argmax(axis=1)  # drawn by the softmax at 2.5
        right = np.take_along_axis(logits, answers[:, None], 1)[:, 0]
        logits[np.arange(4000), answers] = logits[:, 0]
        logits[:, 0] = right
        lists.append(logits)
    temperature = fit_temperature(lists)
    assert temperature == pytest.approx(2.5, rel=0.05)
    assert expected_error(lists, temperature) < 0.03 < expected_error(lists, 1.0)


def test_a_labels_own_probability_has_the_slope_that_it_was_drawn_with() -> None:
    rng = np.random.default_rng(0)
    matches = rng.normal(0, 3, 40_000)
    fits = rng.random(40_000) < expit(1.3 * matches - 3)
    slope, _ = fit_sigmoid(matches[fits], matches[~fits])
    assert slope == pytest.approx(1.3, rel=0.05)
    slope, intercept = fit_sigmoid(np.array([5.0, 6.0, 7.0]), np.linspace(-9, -4, 50))  # a limit keeps them apart
    assert np.isfinite([slope, intercept]).all()
    assert 0 < slope < 10


def test_pairs_calibrate_and_captions_that_do_not_fit_do_not() -> None:
    images, captions, nouns = _pairs(120)
    calibration = calibrate(images, captions, nouns, Scoring(30.0), source="pairs")
    assert calibration is not None
    assert calibration.error < calibration.error_before
    matches = Scoring(30.0).matches(images, captions, nouns)
    np.testing.assert_allclose(calibration.curve, matches.diagonal(), atol=1e-3)
    own, others = (
        calibration.probabilities(matches).diagonal(),
        calibration.probabilities(matches)[~np.eye(120, dtype=bool)],
    )
    assert own.mean() > 0.5 > 10 * others.mean()
    assert calibrate(images, captions[::-1], nouns, Scoring(30.0), source="others' captions") is None
    assert calibrate(images[:20], captions[:20], nouns, Scoring(30.0), source="few") is None
    one_caption = np.repeat(captions[:1], 120, axis=0)
    assert calibrate(images, one_caption, nouns, Scoring(30.0), source="no wrong captions") is None
    sigmoid = calibrate(images, captions, nouns, Scoring(30.0, -9.0), source="pairs")
    assert sigmoid is not None
    assert sigmoid.temperature == 1
