from __future__ import annotations

import numpy as np

from clip_rd_edge.convert.int8.ranges import entropy_ranges, subsample


def test_a_range_excludes_outliers_and_values_that_are_not_finite() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((4, 5_000)).astype(np.float32) for _ in range(2)]
    batches[0][0, 0], batches[1][0, :2] = 8.0, (-np.inf, np.finfo(np.float32).min)  # the last two of masks
    low, high = entropy_ranges({"x": batch} for batch in batches)["x"]
    assert -8 < low < -2
    assert 3 < high < 8


def test_a_range_is_never_wider_than_the_values() -> None:
    positive = np.abs(np.random.default_rng(0).standard_normal((1, 9, 9))).astype(np.float32)
    ranges = entropy_ranges([{"relu": positive, "constant": np.full((2, 3), 0.5, dtype=np.float32)}])
    assert ranges["relu"][0] >= positive.min()
    assert ranges["relu"][1] <= positive.max()
    assert ranges["constant"] == (0.5, 0.5)


def test_a_subset_has_values_of_every_channel() -> None:
    values = np.tile(np.arange(512), (1, 150, 1))  # channels last; half of them have odd numbers, and a step is 2
    assert len(np.unique(subsample(values))) == 512
    assert subsample(np.arange(10)).tolist() == list(range(10))
