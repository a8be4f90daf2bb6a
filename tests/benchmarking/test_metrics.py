from __future__ import annotations

import numpy as np
import pytest

from clip_rd_edge.benchmarking.metrics import (
    Interval,
    accuracy_interval,
    average_precision,
    calibration_error,
    difference_interval,
    difference_p_value,
    false_positives,
    hidden_score,
    may_be_chance,
    separation,
)


def test_calibration_error_by_hand() -> None:
    error = calibration_error(np.asarray([0.9, 0.9, 0.5]), np.asarray([True, False, True]), bins=10)
    assert error == pytest.approx((0.8 + 0.5) / 3)
    # The last bin includes 1.
    assert calibration_error(np.asarray([1.0, 0.9]), np.asarray([False, True]), bins=2) == pytest.approx(0.9 / 2)


def test_a_few_answers_that_are_all_right_or_all_wrong_leave_the_accuracy_open() -> None:
    assert accuracy_interval(np.ones(2, dtype=bool)) == Interval(pytest.approx(0.3424, abs=1e-4), 1.0)
    assert accuracy_interval(np.zeros(30, dtype=bool)) == Interval(0.0, pytest.approx(0.1135, abs=1e-4))


def test_four_lost_answers_and_none_gained_may_be_chance() -> None:
    reference = np.ones(500, dtype=bool)
    hits = np.arange(500) >= 4
    interval = difference_interval(hits, reference)
    assert interval.high < 0
    assert difference_p_value(hits, reference) == difference_p_value(reference, hits) == 0.125
    assert may_be_chance(interval, 0.125)
    assert not may_be_chance(interval, 0.01)
    assert not may_be_chance(interval, 0.125, level=0.8)
    assert difference_p_value(reference, reference) == 1


@pytest.mark.parametrize(("level", "deviations"), [(0.95, 1.960), (0.99, 2.576)])
def test_an_interval_of_many_differences_is_that_of_a_normal_distribution(level: float, deviations: float) -> None:
    number = np.arange(1000)
    hits, reference = number < 560, (number >= 60) & (number < 600)  # 60 won, 40 lost
    interval = difference_interval(hits, reference, level=level)
    half = deviations * np.sqrt((0.06 + 0.04 - 0.02**2) / 1000)
    assert [interval.low, interval.high] == pytest.approx([0.02 - half, 0.02 + half], abs=0.0015)


def test_a_paired_interval_needs_no_example_that_is_alike() -> None:
    hits = np.arange(10) < 9
    interval = difference_interval(hits, ~hits)  # 1 − 0.9 − 0.1 is less than 0
    assert interval.low <= 0.8 <= interval.high


def test_scores_of_known_and_other_images_against_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    known, others = rng.normal(1, 1, 40).round(1), rng.normal(0, 1, 60).round(1)  # with ties
    area = metrics.roc_auc_score([1] * 40 + [0] * 60, np.concatenate([known, others]))
    assert separation(known, others) == pytest.approx(area)
    assert false_positives(np.arange(100.0), np.array([-1.0, 3.0, 50.0, 200.0])) == 0.5
    scores, fits = rng.normal(size=(30, 4)), rng.random((30, 4)) < 0.3
    expected = np.mean([metrics.average_precision_score(fits[:, label], scores[:, label]) for label in range(4)])
    assert average_precision(scores, fits) == pytest.approx(expected)


def test_images_of_hidden_labels_are_told_from_the_others_by_their_best_match() -> None:
    targets = np.arange(100) % 10
    own = targets[:, None] == np.arange(10)
    score = hidden_score(own.astype(np.float32), targets)
    assert score is not None
    assert (score.auroc, score.fpr95, score.auroc_interval.low) == (1.0, 0.0, 1.0)
    noise = np.random.default_rng(0).normal(size=(100, 10)).astype(np.float32)
    chance = hidden_score(noise, targets)
    assert chance is not None
    assert chance.auroc_interval.low < 0.5 < chance.auroc_interval.high
    assert hidden_score(own[:, :3].astype(np.float32), targets % 3) is None
