from __future__ import annotations

import math

import pytest

from clip_rd_edge.utils.timing import sign_test


def test_the_sign_test_adds_up_the_binomial_distributions_tail() -> None:
    assert sign_test(4, 0) == 1 / 16
    assert sign_test(0, 4) == sign_test(0, 0) == 1
    assert sign_test(12, 4) == sum(math.comb(16, k) for k in range(12, 17)) / 2**16
    assert sign_test(2_600, 2_400) == pytest.approx(0.0025, abs=0.0002)  # 2.8 standard deviations, as of a normal
