"""Pairs from WebDataset shards, indexed once for random access.

open_clip streams shards through a shuffle buffer. Here a batch depends only on the seed and the step, so that a resumed
run sees the same batches as an uninterrupted one. This needs the location of every sample.

`pack_samples` writes any training data as shards of small images, which many runs then read fast:

    pack.json     what the shards are made from, written first
    00000.tar     SHARD_SAMPLES samples, in an order of chance: an image, and its caption as .txt or several in a .json
    00000.json    how many samples that has, and which were bad; written after it
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np
from PIL import Image

from clip_rd_edge.bundle.encoder import in_batches
from clip_rd_edge.bundle.images import MAX_PIXELS, ImageFile, opened_image, to_rgb
from clip_rd_edge.data.load import SEPARATOR, is_remote
from clip_rd_edge.data.order import EpochOrder
from clip_rd_edge.data.remote import RemoteShard, ShardFile
from clip_rd_edge.data.samples import BadPair, BadSamples, Counts, Sample, Samples, fingerprint, read_twice
from clip_rd_edge.data.shard_files import TarMember, prefetch
from clip_rd_edge.data.shard_index import index_shards
from clip_rd_edge.data.tar import Kind
from clip_rd_edge.errors import InputError, UsageError, near_matches
from clip_rd_edge.utils.files import new_file, write_bytes
from clip_rd_edge.utils.host import usable_cores
from clip_rd_edge.utils.outputs import exclusive_writer
from clip_rd_edge.utils.paths import Typed, is_file, is_left_by_system
from clip_rd_edge.utils.structs import is_list_of_texts, read_json, to_json
from clip_rd_edge.utils.text import SILENT, Reporter, is_unicode, shown_source

JSON_KEY = "caption"


class Source(NamedTuple):
    """Shards, and the number of times their samples are shown per epoch."""

    shards: tuple[ShardFile, ...]
    weight: int = 1


class Shards:
    """Pairs from one or more sources of shards; implements `data.samples.Samples`.

    The indices run through the samples of the first source, repeated by its weight, then through those of the second:
    with a weight of 2, an epoch shows each sample of a source twice, in two crops.

    Args:
        json_key: read captions from this key of the .json, a string or a list of strings; None reads the .txt, or the
            `caption` of the .json if there is no .txt.
        captioned: whether a sample needs a caption; without, all images count, and captions are not read.
        reporter: receives the progress of indexing; the index of a shard is cached.
    """

    reinforced: ClassVar[bool] = False

    def __init__(
        self,
        name: str,
        sources: Sequence[Source],
        *,
        json_key: str | None = None,
        captioned: bool = True,
        reporter: Reporter = SILENT,
    ) -> None:
        self.name = shown_source(name)
        self._json_key, self._captioned = json_key, captioned
        self._weights = [source.weight for source in sources]
        self._paths = [path for source in sources for path in source.shards]
        self._index = index_shards(
            self._paths, json_key=json_key, captioned=captioned, reinforced=self.reinforced, reporter=reporter
        )
        self.problems = self._index.problems
        # The shard of each group: the shards of a source, as often as its weight says.
        numbers = iter(range(len(self._paths)))
        shown = [list(itertools.islice(numbers, len(shards))) * weight for shards, weight in sources]
        self._shard_of_group = np.concatenate(shown)
        self.groups = self._index.samples[self._shard_of_group]
        self._ends = np.cumsum(self.groups)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def counts(self) -> Counts:
        return Counts(pairs=len(self)) if self._captioned else Counts(images=len(self))

    def read(self, index: int) -> Sample:
        files, captions = self.files(index), tuple[str, ...]()
        if self._captioned and (self._json_key is not None or "text" not in files):
            captions = json_captions(files["json"], self._json_key or JSON_KEY)
        elif self._captioned:  # as open_clip does
            captions = require_captions([read_text(files["text"])], str(files["text"]))
        return Sample(captions, files["image"])

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify these pairs: digests of names, offsets and sizes of all samples."""
        yield from self._index.identity()
        yield repr((self._weights, self._json_key)).encode()

    def prefetch(self, groups: Sequence[int]) -> None:
        """Begin to fetch the shards of these groups, where they are remote."""
        prefetch([self._paths[shard] for shard in dict.fromkeys(self._shard_of_group[list(groups)].tolist())])

    def files(self, index: int) -> dict[Kind, TarMember]:
        """Return the files of a sample."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        shard = int(self._shard_of_group[group])
        located = self._index.locate(shard, index - int(self._ends[group] - self.groups[group]))
        return {kind: TarMember(self._paths[shard], "", *place) for kind, place in located.items()}


def parse_sources(source: Typed, weights: str | None = None) -> list[Source]:
    """Parse sources in open_clip's syntax: `a/{00000..00012}.tar::b.tar`, with weights such as `1::2`."""
    patterns = [Typed(pattern) for pattern in source.split(SEPARATOR)]
    factors = _parse_weights(weights, len(patterns))
    return [Source(_shard_paths(pattern), factor) for pattern, factor in zip(patterns, factors, strict=True)]


def _parse_weights(weights: str | None, sources: int) -> list[int]:
    if not weights:
        return [1] * sources
    parts = [part.strip() for part in weights.split(SEPARATOR)]
    # A weight of 0.5 would show the same half of a source in every epoch.
    if len(parts) != sources or not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(
            f"The weights {weights!r} do not have a positive integer for each of {sources} sources: how often it is "
            "shown per epoch.",
            hint="to show the first source half as often as the second, use 1::2",
            option="train_data_upsampling_factors",
        )
    return [int(part) for part in parts]


def _shard_paths(pattern: Typed) -> tuple[ShardFile, ...]:
    if is_remote(pattern):
        return tuple(RemoteShard(Typed(url)) for url in expand_braces(pattern.strip()))
    paths = tuple(Path(name) for name in expand_braces(pattern.strip()))
    missing = [path for path in paths if not is_file(path)]
    if missing:
        raise InputError(
            f"The shard {missing[0]} does not exist ({len(missing)} of {len(paths)} in {pattern} missing).",
            hint="write a range in braces, as {00000..00012}: * is not expanded" if "*" in pattern else "",
        )
    return paths


_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
MAX_SHARDS = 1_000_000  # that one pattern stands for


def expand_braces(pattern: str) -> list[str]:
    """Expand the braces of a pattern to a list of names, in order; several braces give all combinations.

    A range keeps leading zeros: `{08..11}` gives 08, 09, 10, 11.
    """
    parts = _BRACES.split(pattern)  # what is in braces stands at the odd places
    choices = [_choices(part) if number % 2 else ([part], "") for number, part in enumerate(parts)]
    if (count := math.prod(len(values) for values, _ in choices)) > MAX_SHARDS:
        raise InputError(
            f"The pattern {shown_source(pattern)!r} stands for {count:,} names; the limit is {MAX_SHARDS:,}.",
            hint="check the range in the braces",
        )
    texts = [[format(value, form) for value in values] for values, form in choices]
    return list(map("".join, itertools.product(*texts)))


def _choices(content: str) -> tuple[Sequence[str] | range, str]:
    """Return what the content of braces stands for, and the form in which that is written."""
    numbers = _RANGE.fullmatch(content)
    if numbers is None:
        return content.split(",") if "," in content else [f"{{{content}}}"], ""  # as in a shell
    first, last = numbers.groups()
    # As in a shell, leading zeros on either side set the width of all numbers.
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) and max(len(first), len(last)) > 1 else 0
    step = 1 if int(first) <= int(last) else -1
    return range(int(first), int(last) + step, step), f"0{width}d"


def read_json_member(member: TarMember) -> Any:
    """Return the content of a .json, which may have NaN, Infinity and halves of surrogate pairs, as Python writes."""
    text = read_text(member)
    try:
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(text)
        return json.loads(text)  # slower, but reads them
    except (ValueError, RecursionError) as error:
        raise InputError(f"{member} is not valid JSON: {error}.") from error


def json_captions(
    member: TarMember, key: str, *, hint: str = "name the key with {json_caption_key}"
) -> tuple[str, ...]:
    """Return the captions at a key of a .json, a string or a list of strings; without it, an error with this hint."""
    content = read_json_member(member)
    if not isinstance(content, dict) or key not in content:
        known = [str(name) for name in content] if isinstance(content, dict) else []
        raise InputError(f"{member} has no key {key!r}.{near_matches(key, known)}", hint=hint)
    value = content[key]
    # img2dataset and exports of tables write null for an empty caption.
    captions = [caption for caption in (value if isinstance(value, list) else [value]) if caption is not None]
    return require_captions(captions, str(member))


def require_captions(captions: Sequence[Any], location: str) -> tuple[str, ...]:
    """Return the captions that are not empty, stripped; raise InputError if there are none, or one is no text."""
    texts = [caption.strip() for caption in captions if isinstance(caption, str) and is_unicode(caption)]
    non_empty = tuple(filter(None, texts))
    if len(texts) < len(captions) or not non_empty or any(map(is_list_of_texts, non_empty)):
        is_empty = len(texts) == len(captions) and not non_empty
        what = "empty" if is_empty else "neither a text nor, in a .json, a list of texts"
        raise InputError(f"{location}: the caption is {what}.")
    return non_empty


_MAX_TEXT_BYTES = 1 << 24  # of a sample's caption or metadata


def read_text(member: TarMember) -> str:
    """Return a member's content as text; raises InputError if it cannot be read, is too large or not valid UTF-8."""
    if member.size > _MAX_TEXT_BYTES:
        raise InputError(f"{member} has {member.size:,} bytes; the limit for a text is {_MAX_TEXT_BYTES:,}.")
    try:
        return member.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read {member}: {error}.") from error


SHARD_SAMPLES = 4096  # some 250 MB of JPEGs whose shorter edge has 512 pixels
QUALITY = 90
_RECORD = "pack.json"
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # of what shards may hold as it is


class _Made(msgspec.Struct, frozen=True, kw_only=True):
    """Content of pack.json: all that determines the shards' content, and `data`, which only names it for people."""

    data: str
    samples: int
    samples_sha256: str
    edge: int


class _Shard(msgspec.Struct, frozen=True):
    """Content of the file beside a shard: its samples, its size in bytes, and what is left out."""

    samples: int
    bytes: int
    bad: tuple[BadPair, ...] = ()


class Packed(NamedTuple):
    """Shards: what names them for `data` of `distill`, what is in all of them, and how many samples were unreadable."""

    source: str
    samples: int
    bytes: int
    left_out: int


def pack_samples(samples: Samples, folder: Path, *, edge: int, max_bad: float, reporter: Reporter = SILENT) -> Packed:
    """Write the samples into shards in `folder`, or resume an earlier call that was interrupted.

    An image whose shorter edge has more than `edge` pixels becomes a JPEG with that edge; a smaller one stays as it is,
    byte for byte, if it is a JPEG, PNG or WebP.
    """
    made = _Made(data=samples.name, samples=len(samples), samples_sha256=fingerprint(samples), edge=edge)
    order, parts = EpochOrder(samples.groups, seed=0), in_batches(len(samples), SHARD_SAMPLES)
    names = [f"{number:05d}" for number in range(len(parts))]
    bad, found = BadSamples(samples, max_share=max_bad), list[_Shard]()
    with exclusive_writer(folder, on_wait=reporter.note), ThreadPoolExecutor(usable_cores()) as pool:
        _begin(folder, made)

        def packed(part: slice) -> Iterator[tuple[int, dict[str, bytes] | str]]:
            for few in in_batches(part.stop - part.start, 16 * usable_cores()):
                reporter.update("packing", part.start + few.start, len(samples))
                rows = order.indices(0, part.start + few.start, part.start + few.stop).tolist()
                yield from zip(rows, pool.map(partial(_content, samples, edge), rows), strict=True)

        for part, name in zip(parts, names, strict=True):
            shard, record = folder / f"{name}.tar", folder / f"{name}.json"
            # The record is written last.
            if not (is_file(record) and is_file(shard) and read_json(record, _Shard).bytes == shard.stat().st_size):
                write_bytes(record, to_json(_write(shard, packed(part))))
            found.append(read_json(record, _Shard))
            bad.add(found[-1].bad)
    reporter.update("packing", len(samples), len(samples))
    if bad.summary:
        reporter.note(bad.summary)
    source = folder / (f"{{{names[0]}..{names[-1]}}}.tar" if names[1:] else f"{names[0]}.tar")
    return Packed(str(source), sum(shard.samples for shard in found), sum(shard.bytes for shard in found), len(bad))


def _begin(folder: Path, made: _Made) -> None:
    """Write pack.json, or compare it; refuse a folder with anything else."""
    if not is_file(folder / _RECORD):
        if any(not path.name.startswith(".") and not is_left_by_system(path) for path in folder.iterdir()):
            raise UsageError(f"{folder} is neither empty nor packed data.", option="output")
        write_bytes(folder / _RECORD, to_json(made))
    old, new = (msgspec.to_builtins(one) for one in (read_json(folder / _RECORD, _Made), made))
    changed = [f"{name}: {old[name]} → {new[name]}" for name in new if name != "data" and old[name] != new[name]]
    if changed:
        raise UsageError(
            f"{folder} was packed from other data, or in another way: {', '.join(changed)}.",
            hint="choose another {output}",
            option="output",
        )


def _write(path: Path, packed: Iterable[tuple[int, dict[str, bytes] | str]]) -> _Shard:
    """Write a shard of the files of these rows, which are named by their numbers, without those that are bad."""
    bad, count = list[BadPair](), 0
    with new_file(path) as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for row, content in packed:
                if isinstance(content, str):
                    bad.append((row, content))
                    continue
                count += 1
                for suffix, data in content.items():
                    member = tarfile.TarInfo(f"{row:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        size = file.tell()
    return _Shard(count, size, tuple(bad))


def _content(samples: Samples, edge: int, row: int) -> dict[str, bytes] | str:
    """Return the files of a sample by their suffixes; why it is bad, if it is."""

    def read(index: int) -> dict[str, bytes]:
        texts, file, _ = samples.read(index)
        assert file is not None
        suffix, image = packed_image(file, edge)
        if len(texts) == 1:
            return {suffix: image, "txt": texts[0].encode()}
        return {suffix: image, **({"json": msgspec.json.encode({JSON_KEY: texts})} if texts else {})}

    try:
        return read_twice(read, row)
    except InputError as error:
        return str(error)


def packed_image(file: ImageFile, edge: int) -> tuple[str, bytes]:
    """Return the suffix and the content of an image file in a shard: its shorter edge has at most `edge` pixels."""
    content = io.BytesIO()
    with opened_image(file, MAX_PIXELS) as image:
        suffix, ratio = _SUFFIXES.get(image.format or ""), min(image.size) / edge
        image.draft("RGB", (2 * edge, 2 * edge))
        rgb = to_rgb(image)  # a damaged one raises an error, also where the file itself is taken
        if ratio <= 1 and suffix:
            return suffix, file.read_bytes()
        if ratio > 1:
            scale = edge / min(rgb.size)
            rgb = rgb.resize((round(rgb.width * scale), round(rgb.height * scale)), Image.Resampling.LANCZOS)
        rgb.save(content, "JPEG", quality=QUALITY)
    return "jpg", content.getvalue()
