"""Pairs of pictures and captions, whatever they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from PIL import Image

from clip_rd_edge.errors import InputError, UsageError

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
    on_progress: Callable[[int, int], None] = lambda done, parts: None,
) -> Pairs:
    """Load pairs for training.

    Args:
        source: `emoji` for the embedded data set's training pairs; the path of a CSV or TSV file with a header; or
            WebDataset shards, such as `a/{00000..00012}.tar::b/{000..003}.tar`: all in open_clip's conventions.
            Relative picture paths of a table count from where the command runs, as in open_clip, else from its folder.
        image_key, caption_key: names of the table's two columns.
        separator: of the table; None means tab for `.tsv`, and for others what the header holds.
        weights: how often each source of shards is shown an epoch, such as `1::2`; None for once.
        json_key, on_progress: see `data.shards.ShardPairs`.

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
        from clip_rd_edge.data.shards import ShardPairs, parse_sources

        pairs = ShardPairs(source, parse_sources(source, weights), json_key=json_key, on_progress=on_progress)
    else:
        from clip_rd_edge.data.table import read_table

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
