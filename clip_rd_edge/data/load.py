"""Load pairs by the name of their source: the built-in data set, a table or shards."""

from __future__ import annotations

from pathlib import Path

from clip_rd_edge.data.remote import is_remote
from clip_rd_edge.data.samples import Pairs, first_left_out, hint_to_index_again
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.utils.paths import URL, Typed
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
    reporter: Reporter = SILENT,
) -> Pairs:
    """Load pairs for training.

    Args:
        source: `emoji` for the training pairs of the built-in data set; the path of a CSV, TSV or Parquet file; or
            WebDataset shards, such as `a/{00000..00012}.tar::b/{000..003}.tar`; all in open_clip's conventions.
            Relative image paths in a table are resolved against the working directory, as in open_clip, or else against
            the table's folder.
        image_key, caption_key: names of the table's two columns.
        weights: how often each shard source is shown per epoch, such as `1::2`; None means once.
        json_key, reporter: see `data.webdataset.ShardPairs`.
    """
    if weights and not names_shards(source):
        raise UsageError(f"The weights {weights!r} apply only to shards, but the data are {shown_source(source)}.")
    if source == "emoji":
        from clip_rd_edge.data.emoji import training_pairs

        pairs: Pairs = training_pairs()
    elif names_shards(source):
        from clip_rd_edge.data.webdataset import ShardPairs, parse_sources

        pairs = ShardPairs(source, parse_sources(source, weights), json_key=json_key, reporter=reporter)
    else:
        from clip_rd_edge.data.tables import table_pairs

        require_local(source)
        pairs = table_pairs(Path(source), image_key=image_key, caption_key=caption_key, reporter=reporter)
    if len(pairs) < 2:
        raise InputError(
            f"{pairs.name} has {len(pairs)} pair{'s' * (len(pairs) != 1)}; a contrastive loss needs at least 2."
            f"{first_left_out(pairs)}",
            hint=_hint_about_left_out(pairs) if pairs.left_out else _HINT_TOO_FEW,
        )
    return pairs


_HINT_TOO_FEW = "add pairs, or train on the built-in data set with {data} emoji"


def _hint_about_left_out(pairs: Pairs) -> str:
    """Return what to do about samples that are there, but cannot be used."""
    if names_shards(pairs.name):
        return "each sample needs an image and a caption, as .txt or in a .json: see {json_caption_key}"
    return (
        "check these rows: an image is a local file, with / between folders, relative to the working directory or the "
        f"table; a caption is one text and not empty{hint_to_index_again(pairs)}"
    )
