"""Pairs of pictures and captions, whatever they come from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from PIL import Image

from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.utils.reporting import SILENT, Reporter

TAR_ENDINGS = (".tar", ".tar}")


class Pairs(Protocol):
    """N pictures, each with one caption or more that say the same; training picks one a view.

    Any pair can be had at any time, by its index and in any process: what a step sees is a function of seed and step.

    Attributes:
        name: as logs and provenance show it.
        left_out: what of the source is no pair, such as a sample without a caption, each in words that name its place.
    """

    @property
    def name(self) -> str: ...

    @property
    def left_out(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """The picture as RGB; raises InputError where it cannot be read."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """At least one caption; raises InputError where none can be read."""
        ...

    def identity(self) -> Iterator[bytes]:
        """What tells these pairs from others, in their order; a copy in another folder has the same."""
        ...


def load_pairs(
    source: str,
    *,
    image_key: str = "filepath",
    caption_key: str = "title",
    separator: str | None = None,
    weights: str | None = None,
    json_key: str | None = None,
    reporter: Reporter = SILENT,
) -> Pairs:
    """Load pairs for training.

    Args:
        source: `emoji` for the embedded data set's training pairs; the path of a CSV or TSV file with a header; or
            WebDataset shards, such as `a/{00000..00012}.tar::b/{000..003}.tar`: all in open_clip's conventions.
            Relative picture paths of a table count from where the command runs, as in open_clip, else from its folder.
        image_key, caption_key: names of the table's two columns.
        separator: of the table; None means tab for `.tsv`, and for others what the header holds.
        weights: how often each source of shards is shown an epoch, such as `1::2`; None for once.
        json_key, reporter: see `data.webdataset.ShardPairs`.

    Raises:
        InputError: no such file, a missing column, a missing picture, an empty caption, or fewer than two pairs.
        UsageError: weights that do not fit.
    """
    if weights and not source.endswith(TAR_ENDINGS):
        raise UsageError(f"The weights {weights!r} are for sources of shards, and {source} is none.")
    if source == "emoji":
        from clip_rd_edge.data.emoji import training_pairs

        pairs: Pairs = training_pairs()
    elif source.endswith(TAR_ENDINGS):
        from clip_rd_edge.data.webdataset import ShardPairs, parse_sources

        pairs = ShardPairs(source, parse_sources(source, weights), json_key=json_key, reporter=reporter)
    else:
        from clip_rd_edge.data.tables import read_table

        pairs = read_table(Path(source), image_key=image_key, caption_key=caption_key, separator=separator)
    if len(pairs) < 2:
        raise InputError(f"{pairs.name} has {len(pairs)} pairs; a contrastive loss needs at least 2.")
    return pairs


def require_batch(pairs: Pairs, batch_size: int, *, processes: int = 1) -> None:
    """Refuse a batch that the pairs cannot fill, one without negatives, or one that processes cannot share.

    Raises:
        UsageError: fewer than two pairs a step, more than there are, or not the same number for each process.
    """
    if batch_size < 2:
        raise UsageError(f"The batch size is {batch_size}; a contrastive loss needs at least 2 pairs a step.")
    if batch_size > len(pairs):
        raise UsageError(
            f"The batch size is {batch_size}, but {pairs.name} has only {len(pairs)} pairs.",
            hint=f"--batch-size {len(pairs)} or less",
        )
    if batch_size % processes:
        raise UsageError(f"The batch size is {batch_size}, which {processes} processes cannot share evenly.")


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
