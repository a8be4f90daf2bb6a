"""Load pairs by the name of their source: the built-in data set, a table or shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clip_rd_edge.data.remote import is_remote
from clip_rd_edge.data.samples import Samples
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.utils.paths import URL, Typed, is_folder
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.text import shown_source

# Compressed ones are refused as such, and not as tables.
TAR_SUFFIXES = (".tar", ".tar}", ".tar.gz", ".tgz")


def names_shards(source: str) -> bool:
    """Return whether a source of pairs names WebDataset shards."""
    path = source.partition("?")[0] if URL.search(source) else source  # such as .tar?download=true
    return path.endswith(TAR_SUFFIXES) or source.endswith(TAR_SUFFIXES) or source.startswith("pipe:")


def require_local(source: str) -> None:
    """Raise InputError if what is no shard has a URL, of which Path would make another."""
    if URL.search(source):
        raise InputError(
            f"The data {shown_source(source)} are not on this machine; only shards are read from elsewhere.",
            hint="copy the data to this machine, or name shards: s3://bucket/{00000..00012}.tar",
        )


def local_place(text: str, *, source: str) -> Typed:
    """Return what a suite says as if it was typed: a name, or a path of this machine, but no command and no URL."""
    if any(map(is_remote, map(str.strip, text.split("::")))):
        raise ConfigError(
            f"{source} names {shown_source(text)}, a command or a URL; expected a path of this machine.",
            hint="copy the data to this machine: only what is typed in a command may be run or fetched",
        )
    return Typed(text)


def load_pairs(
    source: Typed,
    *,
    image_key: str = "filepath",
    caption_key: str = "title",
    weights: str | None = None,
    json_key: str | None = None,
    templates: Sequence[str] = (),
    reporter: Reporter = SILENT,
) -> Samples:
    """Load pairs for training.

    Args:
        source: `emoji` for the training pairs of the built-in data set; the path of a CSV, TSV or Parquet file; a
            folder of class folders; or WebDataset shards, such as `a/{00000..00012}.tar::b/{000..003}.tar`. Tables and
            shards are in open_clip's conventions. Relative image paths in a table are resolved against the working
            directory, as in open_clip, or else against the table's folder.
        image_key, caption_key: names of the table's two columns.
        weights: how often each shard source is shown per epoch, such as `1::2`; None means once.
        templates: prompts for the names of class folders.
        json_key, reporter: see `data.webdataset.Shards`.
    """
    if weights and not names_shards(source):
        raise UsageError(
            f"The weights {weights!r} apply only to shards, but the data are {shown_source(source)}.",
            option="train_data_upsampling_factors",
        )
    if source == "emoji":
        from clip_rd_edge.data.emoji import training_pairs

        pairs: Samples = training_pairs()
    elif names_shards(source):
        from clip_rd_edge.data.webdataset import Shards, parse_sources

        pairs = Shards(source, parse_sources(source, weights), json_key=json_key, reporter=reporter)
    else:
        require_local(source)
        if is_folder(source):
            from clip_rd_edge.data.folders import class_samples

            pairs = class_samples(source, Path(source), templates)
        else:
            from clip_rd_edge.data.tables import load_table

            pairs = load_table(Path(source), image_key=image_key, caption_key=caption_key, reporter=reporter)
    if len(pairs) < 2:
        raise InputError(
            f"{pairs.name} has {len(pairs)} pair{'s' * (len(pairs) != 1)}; a contrastive loss needs at least 2."
            f"{pairs.problems.sentence}",
            hint=pairs.problems.hint
            if pairs.problems.count
            else "add pairs, or train on the built-in data set with {data} emoji",
            option="data",
        )
    return pairs
