"""The order in which an epoch shows its pairs: a function of the seed and the epoch, in little memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SHUFFLE_WINDOW = 1 << 16
"""Pairs that are shuffled together: those of some five shards of 12,500 samples; open_clip's buffer holds 5,000."""

Indices = npt.NDArray[np.int64]


class EpochOrder:
    """Shuffles groups of pairs, then the pairs within windows of consecutive groups.

    A group holds pairs that are stored together, such as a shard, so that a window reads a few shards from start to end
    rather than single samples from all of them. Where all pairs fit into one window, the order is a plain permutation.

    Args:
        groups: number of pairs in each group, (G,); group i holds the pairs that follow those of group i - 1. Or (G, K)
            for groups of K such parts: those of column k follow all of column k - 1.
        window: minimum number of pairs per window, but for the last.
    """

    def __init__(self, groups: Sequence[int] | Indices, *, seed: int, window: int = SHUFFLE_WINDOW) -> None:
        sizes = np.asarray(groups, np.int64)
        self._parts = sizes.reshape(len(sizes), -1).T  # (K, G): in the order of the pairs
        self._first = np.cumsum(self._parts).reshape(self._parts.shape) - self._parts
        self._sizes = self._parts.sum(axis=0)
        self._seed, self._window = seed, window
        self._epoch = -1
        self._groups = self._ends = np.empty(0, np.int64)  # groups in the epoch's order; the end of each window in it
        self._windows: list[Indices] = []
        self._order: tuple[int, Indices] = (-1, np.empty(0, np.int64))  # number and pairs of the latest window

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        """Return the pairs at the positions `start` to `stop` of an epoch, (stop - start,)."""
        if epoch != self._epoch:
            self._begin(epoch)
        parts = []
        while start < stop:
            number = int(np.searchsorted(self._ends, start, side="right"))
            first = int(self._ends[number - 1]) if number else 0
            part = self._in_window(number)[start - first : stop - first]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def groups(self, epoch: int, position: int, *, windows: int) -> tuple[int, ...]:
        """Return the groups of the window at a position of an epoch and of the following ones."""
        if epoch != self._epoch:
            self._begin(epoch)
        number = int(np.searchsorted(self._ends, position, side="right"))
        return tuple(int(group) for window in self._windows[number : number + windows] for group in window)

    def _begin(self, epoch: int) -> None:
        self._epoch, self._order = epoch, (-1, np.empty(0, np.int64))
        if len(self) <= self._window:
            self._windows, self._ends = [np.arange(len(self._sizes))], np.asarray([len(self)], np.int64)
            return
        shuffled = np.random.default_rng((self._seed, epoch)).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[shuffled])
        number = (ends - self._sizes[shuffled]) // self._window
        cuts = np.flatnonzero(np.diff(number)) + 1
        self._windows = np.split(shuffled, cuts)
        self._ends = ends[[*(cuts - 1), len(ends) - 1]]

    def _in_window(self, number: int) -> Indices:
        if self._order[0] != number:
            groups = self._windows[number]
            key = (self._seed, self._epoch) if len(self._windows) == 1 else (self._seed, self._epoch, number)
            pairs = np.concatenate([np.arange(size) + first for first, size in self._ranges(groups)])
            self._order = (number, np.random.default_rng(key).permutation(pairs))
        return self._order[1]

    def _ranges(self, groups: Indices) -> list[tuple[int, int]]:
        first, sizes = (of_parts[:, groups].ravel().tolist() for of_parts in (self._first, self._parts))
        return list(zip(first, sizes, strict=True))
