"""Pairs from local WebDataset shards: indexed once, then read at random.

open_clip streams shards; here a batch is a function of seed and step alone, so that a resumed run sees what an
uninterrupted one would have seen. That needs every sample's place, and no shuffle buffer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_rd_edge.contract.images import open_image
from clip_rd_edge.data.tars import Shard, TarMember, open_shard
from clip_rd_edge.errors import InputError, UsageError, near_matches
from clip_rd_edge.utils.reporting import SILENT, Reporter

JSON_KEY = "caption"
SEPARATOR = "::"  # between sources, and between their weights, as in open_clip
_REMOTE = ("://", "pipe:")


@dataclass(frozen=True)
class Source:
    """Some shards, and how often each of their samples is shown an epoch."""

    shards: tuple[Path, ...]
    weight: int = 1


class ShardPairs:
    """The pairs of some sources; it satisfies `data.pairs.Pairs`.

    Index i counts through the first source's samples, as often as its weight says, then through the second's: an epoch
    shows a sample of a source of weight 2 twice, in two crops.

    Args:
        json_key: take captions from this key of the .json, a string or a list of them; None takes the .txt where there
            is one, else the .json's `caption`.
        reporter: told how many shards are indexed; a shard's index is kept for the next time.

    Attributes:
        left_out: samples without a picture or a caption's file, and damaged shards, in words.

    Raises:
        InputError: a shard is missing or is no tar.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Source],
        *,
        json_key: str | None = None,
        reporter: Reporter = SILENT,
    ) -> None:
        self.name = name
        self._json_key = json_key
        self._shards: list[Shard] = []
        left_out: list[str] = []
        numbers, samples = [], []
        count = sum(len(source.shards) for source in sources)
        for source in sources:
            first = len(self._shards)
            for path in source.shards:
                reporter.update("indexing shards", len(self._shards), count)
                self._shards.append(open_shard(path))
            sound = [_sound(shard, json_key, left_out) for shard in self._shards[first:]]
            of_shard = np.repeat(np.arange(first, len(self._shards), dtype=np.int32), [len(part) for part in sound])
            numbers.append(np.tile(of_shard, source.weight))
            samples.append(np.tile(np.concatenate(sound), source.weight))
        self._shard_of, self._sample_of = np.concatenate(numbers), np.concatenate(samples)
        self.left_out = tuple(left_out)

    def __len__(self) -> int:
        return len(self._shard_of)

    def open(self, index: int) -> Image.Image:
        """The picture as RGB; raises InputError where it cannot be read, with shard and sample."""
        shard, sample = self._place(index)
        picture = shard.member(sample, "picture")
        assert picture is not None  # left out at the start otherwise
        return open_image(picture)

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions; raises InputError where there is none, with shard and sample."""
        shard, sample = self._place(index)
        if self._json_key is None and (text := shard.member(sample, "text")):
            return text_captions(text)
        json = shard.member(sample, "json")
        assert json is not None  # left out at the start otherwise
        return json_captions(json, self._json_key or JSON_KEY)

    def identity(self) -> Iterator[bytes]:
        """What tells these pairs from others: names, places and sizes of all samples. No sample is read."""
        for shard in self._shards:
            yield from (shard.path.name.encode(), shard.names.tobytes(), shard.places.tobytes())
        yield from (self._shard_of.tobytes(), self._sample_of.tobytes(), repr(self._json_key).encode())

    def _place(self, index: int) -> tuple[Shard, int]:
        return self._shards[int(self._shard_of[index])], int(self._sample_of[index])


def parse_sources(source: str, weights: str | None = None) -> list[Source]:
    """Sources in open_clip's syntax: `a/{00000..00012}.tar::b.tar`, with weights such as `1::2`.

    Raises:
        InputError: a shard is missing, or is not on this machine.
        UsageError: weights that are not whole numbers from 1 on, or not one a source.
    """
    patterns = source.split(SEPARATOR)
    factors = _weights(weights, len(patterns))
    return [Source(_files(pattern), factor) for pattern, factor in zip(patterns, factors, strict=True)]


def _weights(weights: str | None, sources: int) -> list[int]:
    if not weights:
        return [1] * sources
    parts = [part.strip() for part in weights.split(SEPARATOR)]
    if len(parts) != sources:
        raise UsageError(f"The weights {weights!r} are {len(parts)} for {sources} sources; one is needed for each.")
    for part in parts:
        # An epoch shows every sample a whole number of times: half of a source would be the same half each epoch.
        if not part.isdecimal() or int(part) < 1:
            raise UsageError(
                f"The weight {part!r} is not a whole number from 1 on: it says how often a source is shown an epoch.",
                hint="for one half as often as the other write 1::2",
            )
    return [int(part) for part in parts]


def _files(pattern: str) -> tuple[Path, ...]:
    if any(mark in pattern for mark in _REMOTE):
        raise InputError(f"{pattern} is not on this machine; shards are read from local files.", hint="copy them here")
    paths = tuple(Path(name) for name in expand_braces(pattern.strip()))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"There is no shard {missing[0]} ({len(missing)} of {len(paths)} in {pattern} are missing).")
    return paths


def _sound(shard: Shard, json_key: str | None, left_out: list[str]) -> npt.NDArray[np.int64]:
    """Indices of the samples that have what a pair needs; the others go to `left_out`."""
    captioned = shard.has("json") if json_key is not None else shard.has("text") | shard.has("json")
    pictured = shard.has("picture")
    for index in np.flatnonzero(~(captioned & pictured)).tolist():
        lacking = "picture (.jpg, .png, .webp)" if not pictured[index] else "caption (.txt, .json)"
        left_out.append(f"{shard.path}: {shard.name(index)} has no {lacking}")
    if shard.damage:
        left_out.append(f"{shard.path}: {shard.damage}")
    return np.flatnonzero(captioned & pictured)


_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(pattern: str) -> list[str]:
    """All names that a pattern stands for, in its order; several braces give every combination.

    A range keeps leading zeros: `{08..11}` is 08, 09, 10, 11.

    Raises:
        InputError: a brace that holds neither a range of whole numbers nor a list, or one that stands alone.
    """
    found = _BRACES.search(pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise InputError(f"The pattern {pattern!r} has a brace without its partner.")
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [before + choice + rest for choice in _choices(found[1], pattern) for rest in expand_braces(after)]


def _choices(inside: str, pattern: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        if "," not in inside:
            raise InputError(
                f"{{{inside}}} in {pattern!r} is neither a range nor a list.",
                hint="write {00000..00012} or {train,val}",
            )
        return inside.split(",")
    first, last = numbers.groups()
    # As in a shell: leading zeros on either side set the width of all.
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) and max(len(first), len(last)) > 1 else 0
    step = 1 if int(first) <= int(last) else -1
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]


def text_captions(member: TarMember) -> tuple[str, ...]:
    """The caption of a .txt, lines and all, as open_clip takes it.

    Raises:
        InputError: it is empty, or no UTF-8.
    """
    return _said([read_text(member)], str(member))


def json_captions(member: TarMember, key: str) -> tuple[str, ...]:
    """The captions at a key of a .json: a text or a list of texts.

    Raises:
        InputError: no such key, no text there, or no JSON.
    """
    try:
        content = msgspec.json.decode(read_text(member))
    except msgspec.DecodeError as error:
        raise InputError(f"{member} is not valid JSON: {error}.") from error
    if not isinstance(content, dict) or key not in content:
        known = [str(name) for name in content] if isinstance(content, dict) else []
        raise InputError(f"{member} has no key {key!r}.{near_matches(key, known)}", hint="name it: --json-caption-key")
    value = content[key]
    captions = value if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) for caption in captions):
        raise InputError(f"{member}: {key!r} is neither a text nor a list of texts.")
    return _said(captions, str(member))


def _said(captions: Sequence[str], place: str) -> tuple[str, ...]:
    said = tuple(stripped for caption in captions if (stripped := caption.strip()))
    if not said:
        raise InputError(f"{place}: the caption is empty.")
    return said


def read_text(member: TarMember) -> str:
    """A member's content as UTF-8; raises InputError where it is none or cannot be read."""
    try:
        return member.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read {member}: {error}.") from error
