"""Calibrate a bundle's answers on pairs: its probabilities, and when to answer that nothing fits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clip_rd_edge.benchmarking.metrics import calibration_error, separation
from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.scoring import Calibration, Matches, Scoring

Hits = npt.NDArray[np.bool_]
MIN_PAIRS = 32
MIN_SEPARATION = 0.6  # of own captions from others, as an area under the ROC curve; 0.5 is chance
LIST_SIZES = (5, 20, 100)  # labels in the lists that the temperature is fitted on, each with the right one
PRIOR = 0.05  # share of labels that fit an image, for a label's own probability
_LISTS = 20  # per pair and size
_DIGITS = 4  # of what is stored


def calibrate(
    images: Embeddings, captions: Embeddings, background: Embeddings, scoring: Scoring, *, source: str
) -> Calibration | None:
    """Return what N pairs show, from their embeddings, (N, D) each; None if the captions do not fit their images.

    Args:
        background: embeddings of common nouns, (K, D).
        source: the name of the pairs.
    """
    # Equal captions, such as the prompts of a class, are no wrong answers to each other.
    others = ~(captions @ captions.T > 1 - 1e-5)
    found = scoring.matches(images, captions, background)
    own, wrong = found.diagonal(), found[others]
    if len(images) < MIN_PAIRS or wrong.size == 0 or separation(own, wrong) < MIN_SEPARATION:
        return None
    slope, intercept = fit_sigmoid(own, wrong)
    lists = _label_lists(scoring.scale * (images @ captions.T), others)
    temperature = 1.0 if scoring.is_independent else fit_temperature(lists)
    before, after = (expected_error(lists, value) for value in (1.0, temperature))
    return Calibration(
        temperature=round(temperature, _DIGITS),
        slope=round(slope, _DIGITS),
        intercept=round(intercept, _DIGITS),
        curve=tuple(round(float(match), _DIGITS) for match in own),
        source=source,
        error=0.0 if scoring.is_independent else round(after, _DIGITS),
        error_before=0.0 if scoring.is_independent else round(before, _DIGITS),
    )


def fit_sigmoid(own: Matches, wrong: Matches) -> tuple[float, float]:
    """Return slope and intercept of a logistic regression on matches (Platt 1999), at the PRIOR of a label that fits.

    Newton's method, weighted so that own captions make up the prior; the targets are Platt's, so that pairs without a
    wrong order give no infinite slope.
    """
    values = np.concatenate([own, wrong]).astype(np.float64)
    weights = np.concatenate([np.full(len(own), PRIOR / len(own)), np.full(len(wrong), (1 - PRIOR) / len(wrong))])
    targets = np.concatenate([np.full(len(own), 1 - 1 / (len(own) + 2)), np.full(len(wrong), 1 / (len(wrong) + 2))])
    inputs = np.stack([values, np.ones_like(values)], axis=1)
    solution = np.array([0.0, np.log(PRIOR / (1 - PRIOR))])

    def loss(candidate: npt.NDArray[np.float64]) -> float:
        logits = inputs @ candidate
        return float(weights @ (np.logaddexp(0, logits) - targets * logits))

    for _ in range(100):
        fitted = 1 / (1 + np.exp(-np.clip(inputs @ solution, -30, 30)))
        hessian = (inputs.T * (weights * fitted * (1 - fitted))) @ inputs + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, inputs.T @ (weights * (fitted - targets)))
        while np.abs(step).max() > 1e-6 and loss(solution - step) > loss(solution):
            step /= 2  # far from the solution, Newton's steps overshoot
        solution -= step
        if np.abs(step).max() < 1e-6:
            break
    return float(solution[0]), float(solution[1])


def _label_lists(logits: npt.NDArray[np.floating], others: Hits) -> list[npt.NDArray[np.float64]]:
    """Return logits of lists of labels, the right one first, one array (M, C) per size in LIST_SIZES."""
    rng, lists = np.random.default_rng(0), []
    for size in LIST_SIZES:
        rows = []
        for row, wrong in enumerate(others):
            choices = np.flatnonzero(wrong)
            if len(choices) >= size - 1:
                drawn = [rng.choice(choices, size - 1, replace=False) for _ in range(_LISTS)]
                rows += [logits[row, [row, *chosen]] for chosen in drawn]
        if rows:
            lists.append(np.array(rows, dtype=np.float64))
    return lists or [logits.astype(np.float64)]


def fit_temperature(lists: list[npt.NDArray[np.float64]]) -> float:
    """Return the temperature of the least mean log loss (Guo et al. 2017), each size of list counting the same."""

    def loss(log_temperature: float) -> float:
        scaled = [logits / np.exp(log_temperature) for logits in lists]
        return float(np.mean([np.mean(_log_sum(rows) - rows[:, 0]) for rows in scaled]))

    low, high = np.log(0.05), np.log(20.0)
    golden = (5**0.5 - 1) / 2
    for _ in range(40):  # the loss is convex in the reciprocal, so that it has one minimum
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return float(np.exp((low + high) / 2))


def _log_sum(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    top: npt.NDArray[np.float64] = rows.max(axis=1)
    total: npt.NDArray[np.float64] = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
    return total


def expected_error(lists: list[npt.NDArray[np.float64]], temperature: float, *, bins: int = 15) -> float:
    """Return the expected calibration error of the first answers, the mean over the sizes of lists."""
    errors = []
    for logits in lists:
        rows = logits / temperature
        confidence = np.exp(rows.max(axis=1) - _log_sum(rows))
        errors.append(calibration_error(confidence, rows.argmax(axis=1) == 0, bins=bins))
    return float(np.mean(errors))
