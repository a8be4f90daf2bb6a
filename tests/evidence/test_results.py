from __future__ import annotations

import numpy as np
import pytest

from clip_rd_edge.benchmarking.metrics import difference_interval
from clip_rd_edge.evidence.results import Difference, Evidence, difference, runs_of, spread

from .conftest import PICTURES, Make


def between(evidence: Evidence, method: str) -> Difference | None:
    return difference(runs_of(evidence, "test_vit", method), runs_of(evidence, "test_vit", "none"), 0)


def test_one_seed_has_no_deviation() -> None:
    assert spread([0.25]).deviation is None
    assert spread([1.0, 3.0]).deviation == pytest.approx(2**0.5)


def test_differences_are_of_the_seeds_that_both_have(make: Make) -> None:
    found = between(make({("none", 0): 4, ("none", 1): 10, ("clip-rd", 1): 13}), "clip-rd")
    assert found is not None
    assert (found.spread.count, found.spread.mean) == (1, pytest.approx(3 / PICTURES))
    assert between(make({("none", 0): 4, ("clip-rd", 1): 13}), "clip-rd") is None


def test_seeds_that_disagree_are_told(make: Make) -> None:
    found = between(make({("none", 0): 4, ("none", 1): 10, ("clip-rd", 0): 14, ("clip-rd", 1): 9}), "clip-rd")
    assert found is not None
    assert not found.agreed


def test_more_seeds_on_the_same_pictures_do_not_narrow_the_interval(make: Make) -> None:
    one = between(make({("none", 0): 4, ("clip-rd", 0): 12}), "clip-rd")
    two = between(
        make({(method, seed): n for method, n in (("none", 4), ("clip-rd", 12)) for seed in (0, 1)}), "clip-rd"
    )
    assert one is not None
    assert two is not None
    assert one.interval == two.interval
    ours, theirs = np.arange(PICTURES) < 12, np.arange(PICTURES) < 4
    assert one.interval is not None
    assert one.interval.low == pytest.approx(difference_interval(ours, theirs).low, abs=0.051)
