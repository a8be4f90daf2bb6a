"""Load training data by the name of their source: pairs, images without captions, captions without images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.encoder import fill_template
from clip_rd_edge.bundle.labels import parse_templates
from clip_rd_edge.data.folders import class_samples, image_samples
from clip_rd_edge.data.samples import NO_PROBLEMS, Counts, Problems, Sample, Samples
from clip_rd_edge.data.tables import is_parquet, load_table, parquet_rows
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.utils.paths import URL, Typed, is_file, is_folder
from clip_rd_edge.utils.text import SILENT, Reporter, shown_source

# Compressed ones are refused as such, and not as tables.
TAR_SUFFIXES = (".tar", ".tar}", ".tar.gz", ".tgz")
SEPARATOR = "::"  # between sources of shards and between their weights, as in open_clip
PIPE = "pipe:"


def names_shards(source: str) -> bool:
    """Return whether a source of pairs names WebDataset shards."""
    path = source.partition("?")[0] if URL.search(source) else source  # such as .tar?download=true
    return path.endswith(TAR_SUFFIXES) or source.endswith(TAR_SUFFIXES) or source.startswith(PIPE)


def is_remote(pattern: str) -> bool:
    """Return whether a pattern names shards elsewhere."""
    return bool(URL.search(pattern)) or pattern.startswith(PIPE)


def require_local(source: str) -> None:
    """Raise InputError if something other than a shard has a URL, which Path would change."""
    if URL.search(source):
        raise InputError(
            f"The data {shown_source(source)} are not on this machine; only shards are read from elsewhere.",
            hint="copy the data to this machine, or name shards: s3://bucket/{00000..00012}.tar",
        )


def local_place(text: str, *, source: str) -> Typed:
    """Return what a suite names as if it was typed: a name, or a path of this machine, but no command and no URL."""
    if any(map(is_remote, map(str.strip, text.split(SEPARATOR)))):
        raise ConfigError(
            f"{source} names {shown_source(text)}, a command or a URL; expected a path of this machine.",
            hint="copy the data to this machine: only what is typed in a command may be run or fetched",
        )
    return Typed(text)


def load_pairs(
    source: Typed,
    *,
    image_key: str = "filepath",
    caption_key: str | None = "title",
    weights: str | None = None,
    json_key: str | None = None,
    templates: Sequence[str] = (),
    reporter: Reporter = SILENT,
) -> Samples:
    """Load pairs, or images alone, for training.

    Args:
        source: `emoji` for the training pairs of the built-in data set; the path of a CSV, TSV or Parquet file; a
            folder of class folders; or WebDataset shards, such as `a/{00000..00012}.tar::b/{000..003}.tar`. Tables and
            shards are in open_clip's conventions. Relative image paths in a table are resolved against the working
            directory, as in open_clip, or else against the table's folder. Images alone are in any folder and its
            subfolders, and each that a table names counts once.
        image_key, caption_key: names of the table's two columns. Without the second, captions are not read, or mean
            nothing.
        weights: how often each shard source is shown per epoch, such as `1::2`; None means once.
        templates: prompts for the names of class folders.
        json_key, reporter: see `data.webdataset.Shards`.
    """
    captioned = caption_key is not None
    if source == "emoji":
        from clip_rd_edge.data.emoji import training_pairs

        found: Samples = training_pairs()
    elif names_shards(source):
        from clip_rd_edge.data.webdataset import Shards, parse_sources

        sources = parse_sources(source, weights)
        found = Shards(source, sources, json_key=json_key, captioned=captioned, reporter=reporter)
    elif is_folder(source):
        found = class_samples(source, Path(source), templates) if captioned else image_samples(source, Path(source))
    else:
        require_local(source)
        found = load_table(Path(source), image_key=image_key, caption_key=caption_key, reporter=reporter)
    what, least, usual = "image", 1, "name a folder of images, a table or shards"
    if captioned:
        what, least, usual = "pair", 2, "add pairs, or train on the built-in data set with {data} emoji"
    if len(found) < least:
        raise InputError(
            f"{found.name} has {len(found)} {what}{'s' * (len(found) != 1)}; expected at least {least}."
            f"{found.problems.sentence}",
            hint=found.problems.hint or usual,
            option="data" if captioned else "",
        )
    return found


class TrainingData(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is trained on. `distillation.config.RunConfig` has the same fields.

    A ~ at the beginning of a path stands for the home folder, here and nowhere else: a shell leaves it as it is in
    quotes, and Python does not expand it.

    Attributes:
        data: source of the pairs, as `data.load.load_pairs` takes it; None for none.
        images: a folder of images, or any source of pairs, whose captions are not read; None for none.
        texts: a label file, see `runtime.labels.read_labels_file`, or a Parquet file; None for none.
        templates: prompt templates for the texts, as `bundle.labels.parse_templates` takes them.
        csv_img_key, csv_caption_key, json_caption_key, train_data_upsampling_factors: see `load_pairs`.
    """

    data: Typed | None = None
    images: Typed | None = None
    texts: Typed | None = None
    templates: tuple[Typed, ...] = ()
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    json_caption_key: str | None = None
    train_data_upsampling_factors: str | None = None

    def __post_init__(self) -> None:
        for name in ("data", "images", "texts"):
            if isinstance(source := getattr(self, name), str):
                parts = source.split(SEPARATOR) if names_shards(source) else [source]
                msgspec.structs.force_setattr(self, name, SEPARATOR.join(map(os.path.expanduser, parts)))


@dataclass(frozen=True)
class Mixed:
    """Pairs, and after them U rows whose image and captions do not belong together; implements `data.samples.Samples`.

    The images of these rows are those without captions, each once, or if there are none, those of the pairs, for at
    most as many rows as there are texts. Their captions are the texts in turn: with more texts than rows, each row has
    several, of which training picks one per view. Without texts, they are the captions of pairs. So each row fills a
    place in both towers' batches, and terms that need a matching caption leave it out. For images without captions, a
    teacher may choose other texts as training goes: see `distillation.teacher`.

    Texts alone are as many rows as there are texts, without images.

    Attributes:
        pairs: P pairs, or None.
        images: I images, whose captions are not used, or None.
        texts: T captions.
        templates: each with a place for a text; none for the texts as they are.
    """

    pairs: Samples | None
    images: Samples | None
    texts: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pairs is None and not self.texts:
            raise UsageError(
                "There are no captions to train on.",
                hint="name pairs with {data}, or images and captions apart: {images} FOLDER {texts} labels.txt",
            )

    def __len__(self) -> int:
        return self._pair_count + self._unpaired_count

    @property
    def _parts(self) -> list[Samples]:
        return [source for source in (self.pairs, self.images) if source is not None]

    @cached_property
    def counts(self) -> Counts:
        of_pairs = self.pairs.counts if self.pairs is not None else Counts()
        return of_pairs._replace(images=0 if self.images is None else len(self.images), texts=len(self.texts))

    @cached_property
    def _pair_count(self) -> int:
        return len(self.pairs) if self.pairs is not None else 0

    @cached_property
    def _unpaired_count(self) -> int:
        texts = len(self.texts)
        return self.counts.images or (texts if self.pairs is None else min(texts, self._pair_count))

    @property
    def name(self) -> str:
        return " and ".join([*(part.name for part in self._parts), *(["texts"] if self.texts else [])])

    @property
    def problems(self) -> Problems:
        return sum((part.problems for part in self._parts), NO_PROBLEMS)

    @cached_property
    def groups(self) -> npt.NDArray[np.int64]:
        """Numbers of rows that are stored together: of texts beside pairs, with the pairs whose images they have."""
        of_pairs = np.asarray(self.pairs.groups if self.pairs is not None else [], np.int64)
        if self.pairs is not None and self.images is None:
            ends = -(-np.cumsum(of_pairs) * self._unpaired_count // self._pair_count)  # by `_pair_of`
            return np.stack([of_pairs, np.diff(ends, prepend=0)], axis=1)
        return np.concatenate([of_pairs, [self._unpaired_count] if self.images is None else self.images.groups])

    def prefetch(self, groups: Sequence[int]) -> None:
        """Begin to fetch what these groups are read from."""
        first = len(self.pairs.groups) if self.pairs is not None else 0
        if self.pairs is not None and (own := [group for group in groups if group < first]):
            self.pairs.prefetch(own)
        if self.images is not None and (own := [group - first for group in groups if group >= first]):
            self.images.prefetch(own)

    def read(self, index: int) -> Sample:
        row = index - self._pair_count
        if row < 0:
            assert self.pairs is not None
            return self.pairs.read(index)
        texts = self.texts[row % len(self.texts) :: self._unpaired_count] if self.texts else ()
        captions = tuple(prompt for text in texts for prompt in self.prompts(text))
        image = self.images.read(row).file if self.images is not None else None
        if self.pairs is not None and not (captions and image):  # the other is that of a pair
            pair = self.pairs.read(self._pair_of(row))
            captions, image = captions or pair.captions, image or pair.file
        return Sample(captions, image, paired=False)

    def prompts(self, text: str) -> tuple[str, ...]:
        """Return a text in each of the templates; as it is, if there are none."""
        return tuple(fill_template(template, text) for template in self.templates) or (text,)

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify all parts and their order."""
        for source in (self.pairs, self.images):
            yield b"none" if source is None else f"{len(source)}".encode()
            yield from source.identity() if source is not None else ()
        yield "\0".join(self.texts).encode()
        yield "\0".join(self.templates).encode()

    def _pair_of(self, row: int) -> int:
        """Return the pair whose image or captions stand in an unpaired row: evenly spaced, or all in turn.

        Without images of their own, later rows have later pairs, by which `groups` divides them.
        """
        if self._unpaired_count < self._pair_count:
            return row * self._pair_count // self._unpaired_count
        return row % self._pair_count


def load_samples(
    source: TrainingData, read_texts: Callable[[Typed, str], Sequence[str]], *, reporter: Reporter = SILENT
) -> Samples:
    """Load what a model is trained on: plain pairs if that is all that is named.

    Args:
        read_texts: `runtime.labels.read_texts`; returns the content of `source.texts` if it is not a Parquet file.
    """
    templates = parse_templates(source.templates).prompts if source.templates else ()
    pairs = None
    if source.data is not None:
        pairs = load_pairs(
            source.data,
            image_key=source.csv_img_key,
            caption_key=source.csv_caption_key,
            weights=source.train_data_upsampling_factors,
            json_key=source.json_caption_key,
            templates=templates,
            reporter=reporter,
        )
        if source.images is None and source.texts is None:
            return pairs
    images = None
    if source.images is not None:
        images = load_pairs(source.images, image_key=source.csv_img_key, caption_key=None, reporter=reporter)
    texts = load_texts(source.texts, source.csv_caption_key, read_texts) if source.texts is not None else ()
    return Mixed(pairs, images, tuple(dict.fromkeys(texts)), templates)


def load_texts(source: Typed, column: str, read_texts: Callable[[Typed, str], Sequence[str]]) -> Sequence[str]:
    """Load texts from a label file by `read_texts`, or from a column of a Parquet file; raises InputError."""
    require_local(source)
    path = Path(source)
    if not (is_file(path) and is_parquet(path)):
        return read_texts(source, column)
    rows = parquet_rows(path, {column: "csv_caption_key"})
    return [text.strip() for _, text, _, _ in rows if text.strip()]
