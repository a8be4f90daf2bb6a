from __future__ import annotations

import numpy as np

from clip_rd_edge.convert.int8.ranges import entropy_ranges


def test_a_range_leaves_outliers_out_and_what_is_not_finite() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((4, 5_000)).astype(np.float32) for _ in range(2)]
    batches[0][0, 0], batches[1][0, 0] = 8.0, -np.inf
    low, high = entropy_ranges({"x": batch} for batch in batches)["x"]
    assert -8 < low < -2
    assert 3 < high < 8


def test_a_range_is_never_wider_than_the_values() -> None:
    positive = np.abs(np.random.default_rng(0).standard_normal((1, 9, 9))).astype(np.float32)
    found = entropy_ranges([{"relu": positive, "same": np.full((2, 3), 0.5, dtype=np.float32)}])
    assert found["relu"][0] >= positive.min()
    assert found["relu"][1] <= positive.max()
    assert found["same"] == (0.5, 0.5)
