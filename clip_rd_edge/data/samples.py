"""Image-caption pairs for training, whatever their source."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.utils.files import machine_failure


class Pairs(Protocol):
    """N images, each with one or more equivalent captions; training picks one per view.

    Any process can read any pair at any time by its index, so a batch depends only on the seed and the step.

    Attributes:
        name: as shown in logs and provenance.
        left_out: parts of the source that are not pairs, such as a sample without a caption; each entry is a message
            that names the location.
        lost: about how many further samples are in damaged parts of the source, of which nothing else is known.
        groups: numbers of consecutive pairs that are stored together, such as the samples of each shard; see
            `data.order.EpochOrder` for those in several parts.
    """

    @property
    def name(self) -> str: ...

    @property
    def left_out(self) -> Sequence[str]: ...

    @property
    def lost(self) -> int: ...

    @property
    def groups(self) -> Sequence[int] | npt.NDArray[np.int64]: ...

    def __len__(self) -> int: ...

    def prefetch(self, groups: Sequence[int]) -> None:
        """Begin to fetch what these groups are read from, if that is elsewhere; returns at once."""
        ...

    def open(self, index: int) -> Image.Image:
        """Return the image as RGB; raises InputError if it cannot be read."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Return one or more captions; raises InputError if none can be read."""
        ...

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify these pairs and their order; a copy in another folder yields the same.

        Names without folders, captions and sizes in bytes, as far as they are known without reading samples.
        """
        ...


def fingerprint(pairs: Pairs) -> str:
    """Return a SHA-256 of what identifies the pairs, wherever they lie.

    No sample is read, so that a run over millions of pairs starts at once: an image that is replaced by another one of
    the same name and size in bytes is not noticed.
    """
    digest = hashlib.sha256(f"{len(pairs)}\n".encode())
    for part in pairs.identity():
        digest.update(part + b"\x1e")
    return digest.hexdigest()


def first_left_out(pairs: Pairs) -> str:
    """Return the sentence, after a space, that says how many samples were left out and why the first; empty if none."""
    left_out = pairs.left_out
    return f" {len(left_out):,} were left out; the first: {left_out[0]}." if left_out else ""


def hint_to_index_again(pairs: Pairs) -> str:
    """Return what to do about images that came after a large table was indexed; empty for other data."""
    from clip_rd_edge.data.tables import IndexedTable

    return f"; if images were added since, touch {pairs.name}" if isinstance(pairs, IndexedTable) else ""


def require_batch(pairs: Pairs, batch_size: int, *, processes: int = 1, what: str = "pairs") -> None:
    """Check that a batch has negatives, that there are enough pairs to fill it, and that processes can share it evenly.

    Args:
        what: what the rows of `pairs` are called.
    """
    if batch_size < 2:
        raise UsageError(f"The batch size is {batch_size}; a contrastive loss needs at least 2 pairs per step.")
    if batch_size > len(pairs):
        raise UsageError(
            f"The batch size is {batch_size:,}, but {pairs.name} has only {len(pairs):,} {what}.",
            hint=f"{{batch_size}} {len(pairs)} or less",
        )
    if batch_size % processes:
        raise UsageError(f"The batch size is {batch_size}, which {processes} processes cannot share evenly.")


MAX_BAD_SHARE = 0.01  # of all samples
BadPair = tuple[int, str]  # index and reason
T = TypeVar("T")
_PAUSE_S = 2.0  # most errors of networks and disks pass


@dataclass(frozen=True)
class ValidPair:
    """An image and its captions."""

    image: Image.Image
    captions: tuple[str, ...]


def read_twice(read: Callable[[int], T], index: int) -> T:
    """Read a sample; one that the machine fails to deliver is no bad sample: it is tried once more.

    Args:
        read: reads a sample by its index; raises InputError if it cannot.
    """
    try:
        return read(index)
    except InputError as error:
        if machine_failure(error) is None:
            raise
    time.sleep(_PAUSE_S)
    try:
        return read(index)
    except InputError as error:
        if failure := machine_failure(error):
            raise failure from error
        raise


class BadSamples:
    """Counts bad samples: those that the source leaves out, and those that fail when they are read.

    Args:
        max_share: max share of bad samples among all samples.
    """

    def __init__(self, pairs: Pairs, *, max_share: float = MAX_BAD_SHARE) -> None:
        self._pairs, self._max_share = pairs, max_share
        self._reasons: dict[int, str] = {}  # by the index of the bad pair
        self._shared = 0  # of these, the number that all processes know
        samples = len(pairs) + self.left_out
        self.allowed = math.floor(max_share * samples)
        self._check(pairs.left_out)

    def __len__(self) -> int:
        return self.left_out + self.bad_pairs

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._pairs)

    @property
    def left_out(self) -> int:
        """Number of samples that the source leaves out, or has lost."""
        return len(self._pairs.left_out) + self._pairs.lost

    @property
    def bad_pairs(self) -> int:
        """Number of pairs that could not be read, in this process or in those that have shared theirs."""
        return len(self._reasons)

    @property
    def unshared(self) -> int:
        """Number of bad pairs that other processes may not know yet."""
        return len(self._reasons) - self._shared

    @property
    def summary(self) -> str:
        """Number of bad pairs and the reason of the first, as a sentence; empty if there are none."""
        if not self._reasons:
            return ""
        count, first = len(self._reasons), next(iter(self._reasons.values()))
        are = "pair cannot be read and is" if count == 1 else "pairs cannot be read and are"
        return f"{count:,} of {len(self._pairs):,} {are} left out; the first: {first}"

    def add(self, bad: Iterable[BadPair]) -> None:
        """Count bad pairs, each only once."""
        new = {index: reason for index, reason in bad if index not in self._reasons}
        self._reasons.update(new)
        self._check(tuple(new.values()))

    def share(self, gather: Callable[[list[BadPair]], list[list[BadPair]]]) -> None:
        """Count the bad pairs of all processes. Over the epochs, each process meets the same ones: they count once.

        Args:
            gather: returns what each process passes to it.
        """
        own = list(islice(self._reasons.items(), self._shared, None))
        bad = list(chain.from_iterable(gather(own)))
        self._reasons.update(bad)
        self._shared = len(self._reasons)
        self._check([reason for _, reason in bad[-1:]])

    def state_dict(self) -> dict[str, Any]:
        """Return the bad pairs met so far, for a checkpoint, and of which data; their reasons are told once."""
        return {"pairs": list(self._reasons), "of": self._fingerprint if self._reasons else ""}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count the bad pairs of a state that `state_dict` returned; all processes load the same one.

        Those of other data are not counted: a run may go on with data that were repaired or replaced.
        """
        bad = state["pairs"]
        # Earlier versions did not say of which data. Where nothing is bad, millions of pairs need no fingerprint.
        is_known = bool(bad) and state.get("of", self._fingerprint) == self._fingerprint
        self._reasons = dict.fromkeys(bad, "") if is_known else {}
        self._shared = len(self._reasons)

    def next_valid(self, index: int, read: Callable[[int], T]) -> tuple[T | None, tuple[BadPair, ...]]:
        """Read the first valid pair from `index` on.

        Args:
            read: reads a pair by its index; raises InputError if it is bad.

        Returns:
            What `read` returned, or None if the bad pairs exceed the limit; and the bad pairs. They are not counted
            yet: this may run in a worker process, and `add` must be called in the main process.
        """
        bad: list[BadPair] = []
        while len(bad) <= self.allowed:
            candidate = (index + len(bad)) % len(self._pairs)
            try:
                return read_twice(read, candidate), tuple(bad)
            except InputError as error:
                bad.append((candidate, str(error)))
        return None, tuple(bad)

    def take(self, index: int) -> ValidPair:
        """Return the first valid pair from `index` on, and count the bad ones; raises as `add` and `read_twice`."""
        pair, bad = self.next_valid(index, self._read)
        self.add(bad)
        assert pair is not None  # otherwise the limit was exceeded and `add` has raised
        return pair

    def _read(self, index: int) -> ValidPair:
        return ValidPair(self._pairs.open(index), self._pairs.captions(index))

    def _check(self, latest: Sequence[str]) -> None:
        if len(self) > self.allowed and latest:
            self._refuse(len(self), latest[0])

    def _refuse(self, bad: int, example: str) -> NoReturn:
        samples = len(self._pairs) + self.left_out
        raise InputError(
            f"{bad:,} of {samples:,} samples of {self._pairs.name} are bad, more than {self._max_share:.2%}: "
            f"{example.rstrip('.')}.",
            hint=(
                f"fix or remove them, or accept them: {{max_bad}} {math.ceil(100 * bad / samples) / 100:g}"
                if bad <= samples / 2
                else "check the source: half of it or more is no use"
            )
            + hint_to_index_again(self._pairs),
        )
