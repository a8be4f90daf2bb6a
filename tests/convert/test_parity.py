from __future__ import annotations

import numpy as np
import pytest

from clip_rd_edge.contract.encoder import normalise
from clip_rd_edge.convert.parity import agreement
from clip_rd_edge.errors import UsageError


def test_the_same_embeddings_agree() -> None:
    a = normalise(np.random.default_rng(0).standard_normal((8, 16)))
    found = agreement(a, a)
    assert found.max_difference == 0
    assert found.cosine == pytest.approx(1)
    assert found.centred_cosine == pytest.approx(1)
    assert found.samples == 8


def test_collapse_to_the_mean_shows_in_the_centred_cosine_alone() -> None:
    rng = np.random.default_rng(0)
    mean = 10 * rng.standard_normal(64)
    a, b = (normalise(mean + rng.standard_normal((32, 64))) for _ in range(2))
    found = agreement(a, b)
    assert found.cosine > 0.95
    assert abs(found.centred_cosine) < 0.2


def test_nan_agrees_with_nothing() -> None:
    a = normalise(np.random.default_rng(0).standard_normal((4, 8)))
    b = a.copy()
    b[2, 3] = np.nan
    found = agreement(a, b)
    assert (found.max_difference, found.cosine, found.centred_cosine) == (float("inf"), 0, 0)


@pytest.mark.parametrize("shapes", [((4, 8), (4, 9)), ((1, 8), (1, 8)), ((8,), (8,))])
def test_what_cannot_be_compared_is_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(UsageError, match="cannot be compared"):
        agreement(np.ones(shapes[0], dtype=np.float32), np.ones(shapes[1], dtype=np.float32))
