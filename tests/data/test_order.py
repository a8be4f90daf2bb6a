"""The order of an epoch shows every pair once, and reads few groups at a time."""

from __future__ import annotations

import numpy as np
import pytest

from clip_rd_edge.data.order import EpochOrder

GROUPS = [7, 1, 30, 12, 0, 5, 25, 16, 9, 22]


@pytest.mark.parametrize("window", [1, 20, 64, 1000])
def test_an_epoch_shows_every_pair_once(window: int) -> None:
    order = EpochOrder(GROUPS, seed=3, window=window)
    for epoch in range(3):
        assert sorted(order.indices(epoch, 0, len(order))) == list(range(sum(GROUPS)))


def test_parts_of_an_epoch_are_those_of_the_whole_in_any_sequence() -> None:
    order = EpochOrder(GROUPS, seed=3, window=20)
    whole = {epoch: order.indices(epoch, 0, len(order)) for epoch in (0, 1)}
    resumed = EpochOrder(GROUPS, seed=3, window=20)
    for epoch, start, stop in [(1, 100, 127), (0, 90, 101), (0, 0, 0), (1, 3, 64), (1, 0, 1)]:
        np.testing.assert_array_equal(resumed.indices(epoch, start, stop), whole[epoch][start:stop])


def test_a_window_holds_few_groups() -> None:
    groups, window = [10] * 50, 40
    order = EpochOrder(groups, seed=0, window=window)
    indices = order.indices(0, 0, len(order))
    for start in range(0, len(order) - window, window):
        assert len(set(indices[start : start + window] // 10)) == 4
    neighbours = np.diff(indices[:window])
    assert (neighbours == 1).mean() < 0.2  # shuffled within the window


def test_the_parts_of_a_group_are_shown_in_one_window() -> None:
    groups = np.array([(10, 5)] * 50)
    order = EpochOrder(groups, seed=0, window=60)
    indices = order.indices(0, 0, len(order))
    assert sorted(indices) == list(range(750))
    for start in range(0, len(order) - 60, 60):
        window = indices[start : start + 60]
        first, second = window[window < 500] // 10, (window[window >= 500] - 500) // 5
        assert (len(first), len(second), set(first)) == (40, 20, set(second))


def test_an_order_that_was_used_shows_each_epoch_in_its_own_order_also_within_one_window() -> None:
    order = EpochOrder(GROUPS, seed=3)
    for epoch in (0, 1, 0):
        fresh = EpochOrder(GROUPS, seed=3).indices(epoch, 0, 50)
        np.testing.assert_array_equal(order.indices(epoch, 0, 50), fresh)
    assert order.indices(0, 0, 50).tolist() != order.indices(1, 0, 50).tolist()


def test_epochs_seeds_and_windows_are_each_shuffled_in_their_own_way() -> None:
    orders = [EpochOrder([10] * 10, seed=seed, window=20).indices(epoch, 0, 100) for seed in (0, 1) for epoch in (0, 1)]
    groups = [tuple(frozenset(window // 10) for window in order.reshape(5, 20)) for order in orders]
    assert len(set(groups)) == 4
    windows = EpochOrder([20] * 6, seed=0, window=20).indices(0, 0, 120).reshape(6, 20)
    assert len({tuple(window % 20) for window in windows}) == 6


def test_one_window_gives_a_plain_permutation() -> None:
    expected = np.random.default_rng((5, 2)).permutation(sum(GROUPS))
    np.testing.assert_array_equal(EpochOrder(GROUPS, seed=5).indices(2, 0, sum(GROUPS)), expected)


def test_the_windows_that_follow_the_last_of_an_epoch_are_those_of_the_next() -> None:
    order = EpochOrder([10] * 40, seed=0, window=50)

    def shown(*windows: tuple[int, int]) -> list[int]:
        """The groups of windows, each by its epoch and its number in it."""
        fresh = EpochOrder([10] * 40, seed=0, window=50)
        pairs = [fresh.indices(epoch, 50 * number, 50 * number + 50) for epoch, number in windows]
        return sorted(set(np.concatenate(pairs) // 10))

    for epoch in (0, 1):
        assert sorted(order.groups(epoch, 60, windows=2, epochs=3)) == shown((epoch, 1), (epoch, 2))
        last = order.groups(epoch, 399, windows=2, epochs=3)
        assert sorted(last[:5]) == shown((epoch, 7))
        assert sorted(last) == shown((epoch, 7), (epoch + 1, 0))
        assert len(last) > 5
    assert sorted(order.groups(2, 399, windows=2, epochs=3)) == shown((2, 7))


def test_fifteen_million_pairs_need_no_list_of_them() -> None:
    order = EpochOrder([12_500] * 1200, seed=0)
    indices = order.indices(0, 7_000_000, 7_001_024)
    assert len(set(indices)) == 1024
    held = sum(value.nbytes for value in vars(order).values() if isinstance(value, np.ndarray)) + order._order[1].nbytes
    assert held < 4 << 20
