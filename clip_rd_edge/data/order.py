"""The order in which an epoch shows its pairs, and the steps that follow from it: functions of the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

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
        window: minimum number of pairs per window, except the last.
    """

    def __init__(self, groups: Sequence[int] | Indices, *, seed: int, window: int = SHUFFLE_WINDOW) -> None:
        sizes = np.asarray(groups, np.int64)
        self._parts = sizes.reshape(len(sizes), -1).T  # (K, G): in the order of the pairs
        self._first = np.cumsum(self._parts).reshape(self._parts.shape) - self._parts
        self._sizes = self._parts.sum(axis=0)
        self._seed, self._window = seed, window
        self._cuts: dict[int, tuple[list[Indices], Indices]] = {}  # of the latest epoch, and the one after it
        self._order = (-1, -1), np.empty(0, np.int64)  # epoch and number of the latest window, and its pairs

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        """Return the pairs at the positions `start` to `stop` of an epoch, (stop - start,)."""
        _, ends = self._cut(epoch)
        parts = []
        while start < stop:
            number = int(np.searchsorted(ends, start, side="right"))
            first = int(ends[number - 1]) if number else 0
            part = self._in_window(epoch, number)[start - first : stop - first]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def groups(self, epoch: int, position: int, *, windows: int, epochs: int) -> tuple[int, ...]:
        """Return the groups of the window at a position of an epoch and of the following ones, each group once.

        Args:
            windows: number of windows, the one at the position included.
            epochs: number of epochs that are shown. At the end of one, the windows are also those of the next.
        """
        own, ends = self._cut(epoch)
        number = int(np.searchsorted(ends, position, side="right"))
        upcoming = own[number : number + windows]
        if len(upcoming) < windows and epoch + 1 < epochs:
            upcoming = upcoming + self._cut(epoch + 1)[0][: windows - len(upcoming)]
        return tuple(dict.fromkeys(int(group) for window in upcoming for group in window))

    def _cut(self, epoch: int) -> tuple[list[Indices], Indices]:
        """Return the groups of each window of an epoch, and the position at which it ends."""
        if epoch not in self._cuts:
            before = {number: cut for number, cut in self._cuts.items() if number == epoch - 1}
            self._cuts = {**before, epoch: self._cut_anew(epoch)}
        return self._cuts[epoch]

    def _cut_anew(self, epoch: int) -> tuple[list[Indices], Indices]:
        if len(self) <= self._window:
            return [np.arange(len(self._sizes))], np.asarray([len(self)], np.int64)
        shuffled = np.random.default_rng((self._seed, epoch)).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[shuffled])
        number = (ends - self._sizes[shuffled]) // self._window
        cuts = np.flatnonzero(np.diff(number)) + 1
        return np.split(shuffled, cuts), ends[[*(cuts - 1), len(ends) - 1]]

    def _in_window(self, epoch: int, number: int) -> Indices:
        if self._order[0] != (epoch, number):
            windows, _ = self._cut(epoch)
            key = (self._seed, epoch) if len(windows) == 1 else (self._seed, epoch, number)
            pairs = np.concatenate([np.arange(size) + first for first, size in self._ranges(windows[number])])
            self._order = (epoch, number), np.random.default_rng(key).permutation(pairs)
        return self._order[1]

    def _ranges(self, groups: Indices) -> list[tuple[int, int]]:
        first, sizes = (of_parts[:, groups].ravel().tolist() for of_parts in (self._first, self._parts))
        return list(zip(first, sizes, strict=True))


class View(NamedTuple):
    """What is shown of a sample, by its number, in an epoch; the step chooses the prompt of class folders alone."""

    epoch: int
    sample: int
    step: int = 0


class StepSampler:
    """The views of each step.

    Epochs are shuffled by (seed, epoch), see `EpochOrder`; an incomplete last batch is dropped.

    Args:
        groups: `Samples.groups`.
        batch_size: of the global batch, of which each process gets its part.
        steps: their numbers.
        rank, processes: this process's rank, and the number of processes.
        prefetch: called with groups that will soon be read.
    """

    def __init__(
        self,
        groups: Sequence[int] | npt.NDArray[np.int64],
        batch_size: int,
        *,
        seed: int,
        steps: range,
        rank: int = 0,
        processes: int = 1,
        prefetch: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        self.prefetch = prefetch
        self.order = EpochOrder(groups, seed=seed)
        self.batch_size = batch_size
        self.steps = steps
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator[list[View]]:
        steps_per_epoch = len(self.order) // self.batch_size
        size = self.batch_size // self.processes
        upcoming: tuple[int, ...] = ()
        for step in self.steps:
            epoch, number = divmod(step, steps_per_epoch)
            position = number * self.batch_size
            if self.prefetch:
                epochs = -(-self.steps.stop // steps_per_epoch)
                groups = self.order.groups(epoch, position, windows=2, epochs=epochs)
                if groups != upcoming:
                    upcoming = groups
                    self.prefetch(groups)
            first = position + self.rank * size
            yield [View(epoch, index, step) for index in self.order.indices(epoch, first, first + size).tolist()]

    def __len__(self) -> int:
        return len(self.steps)
