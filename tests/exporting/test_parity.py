from __future__ import annotations

import numpy as np
import pytest

from clip_rd_edge.bundle.encoder import normalise
from clip_rd_edge.exporting.parity import agreement, measurement, top1_matches


def test_only_the_centred_cosine_shows_a_collapse_to_the_mean() -> None:
    rng = np.random.default_rng(0)
    mean = 10 * rng.standard_normal(64)
    a, b = (normalise(mean + rng.standard_normal((32, 64))) for _ in range(2))
    result = agreement(a, b)
    assert result.cosine > 0.95
    assert abs(result.centred_cosine) < 0.2


def test_nan_agrees_with_nothing() -> None:
    a = normalise(np.random.default_rng(0).standard_normal((4, 8)))
    b = a.copy()
    b[2, 3] = np.nan
    result = agreement(a, b)
    assert (result.max_difference, result.cosine, result.centred_cosine) == (float("inf"), 0, 0)


def test_latencies_are_a_median_and_the_95th_percentile() -> None:
    same = agreement(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32))
    latencies_ms = np.asarray([*range(1, 100), 1000], float)  # whose mean is 59.5
    measured = measurement(same, latencies_ms, reference_ms=2 * latencies_ms, threads=3)
    assert (measured.latency_ms_p50, measured.latency_ms_p95) == pytest.approx((50.5, 95.05))
    assert (measured.speedup, measured.threads) == (2, 3)
    # A run that is longer than a time slice is interrupted more often than not on a busy machine.
    fp32, int8 = np.array([4.0, 4.0, 12.0, 12.0, 12.0]), np.array([2.0, 2.0, 2.0, 2.0, 9.0])
    assert measurement(same, int8, reference_ms=fp32, threads=1).speedup == 2


def test_an_image_is_right_whose_own_caption_is_the_nearest_of_all() -> None:
    images = np.asarray([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]], np.float32)
    captions = np.asarray([[1, 0], [1, 0], [0, 1], [1, 0]], np.float32)  # the first two are of one text
    assert top1_matches(images, captions).tolist() == [True, True, True, False]
    assert top1_matches(images[[1, 0]], np.asarray([[0.8, 0.6], [0.6, 0.8]], np.float32)).tolist() == [True, False]
