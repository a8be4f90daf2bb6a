"""Bad samples: the next sound one is taken in their place, until there are too many.

Among millions of pictures from the web some are damaged. Which pair is taken instead is a function of the index alone,
so that a resumed run sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from PIL import Image

from clip_rd_edge.data.pairs import Pairs
from clip_rd_edge.errors import InputError

MAX_SHARE = 0.01  # of all samples
Bad = tuple[int, str]  # index of a pair, and what is wrong with it


@dataclass(frozen=True)
class SoundPair:
    """A picture and its captions, and the bad pairs that were passed over on the way to it."""

    image: Image.Image
    captions: tuple[str, ...]
    passed_over: tuple[Bad, ...]


class BadSamples:
    """Counts bad samples: those that the pairs leave out, and those that turn out to be bad when they are read.

    Raises:
        InputError: the pairs leave out more than `max_share` of their samples.
    """

    def __init__(self, pairs: Pairs, *, max_share: float = MAX_SHARE) -> None:
        self._pairs, self._max_share = pairs, max_share
        self._found: dict[int, str] = {}
        samples = len(pairs) + len(pairs.left_out)
        self.allowed = math.floor(max_share * samples)
        self._check(pairs.left_out)

    def __len__(self) -> int:
        return self.left_out + self.found

    @property
    def left_out(self) -> int:
        """Samples that are no pairs."""
        return len(self._pairs.left_out)

    @property
    def found(self) -> int:
        """Pairs that turned out to be bad, in this process."""
        return len(self._found)

    def add(self, found: Iterable[Bad]) -> None:
        """Count bad pairs, each once, however often it is met.

        Raises:
            InputError: there are more than the share allows; it names the last.
        """
        fresh = {index: reason for index, reason in found if index not in self._found}
        self._found.update(fresh)
        self._check(tuple(fresh.values()))

    def check_total(self, found: int) -> None:
        """Refuse as `add` does, in every process, by what all of them found; a pair met by two counts twice."""
        if self.left_out + found > self.allowed:
            self._refuse(self.left_out + found, next(reversed(self._found.values()), "found by another process"))

    def sound(self, index: int) -> SoundPair | tuple[Bad, ...]:
        """The pair at `index`, or the next one that is sound; where that is too far off, the bad ones alone.

        What is returned is not counted yet: this may run in a worker process, and `add` counts where all come together.
        """
        bad: list[Bad] = []
        while len(bad) <= self.allowed:
            at = (index + len(bad)) % len(self._pairs)
            try:
                return SoundPair(self._pairs.open(at), self._pairs.captions(at), tuple(bad))
            except InputError as error:
                bad.append((at, str(error)))
        return tuple(bad)

    def take(self, index: int) -> SoundPair:
        """As `sound`, counted at once; raises as `add`."""
        found = self.sound(index)
        self.add(found.passed_over if isinstance(found, SoundPair) else found)
        assert isinstance(found, SoundPair)  # else there were more than are allowed, and `add` has raised
        return found

    def _check(self, latest: tuple[str, ...]) -> None:
        if len(self) > self.allowed and latest:
            self._refuse(len(self), latest[0])

    def _refuse(self, bad: int, example: str) -> NoReturn:
        samples = len(self._pairs) + len(self._pairs.left_out)
        raise InputError(
            f"{bad:,} of {samples:,} samples of {self._pairs.name} are bad, more than {self._max_share:.2%}: "
            f"{example.rstrip('.')}.",
            hint="mend or remove them, or allow more with --max-bad",
        )
