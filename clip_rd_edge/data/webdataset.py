"""Pairs from WebDataset shards, indexed once for random access.

open_clip streams shards through a shuffle buffer. Here a batch depends only on the seed and the step, so that a resumed
run sees the same batches as an uninterrupted one. This needs the location of every sample.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from clip_rd_edge.data.order import SHUFFLE_WINDOW
from clip_rd_edge.data.remote import RemoteShard, ShardFile, is_remote, version
from clip_rd_edge.data.samples import Counts, Sample
from clip_rd_edge.data.shard_files import LIMIT_VARIABLE, TarMember, cache_limit, prefetch
from clip_rd_edge.data.shard_index import Located, index_shards
from clip_rd_edge.errors import InputError, UsageError, near_matches
from clip_rd_edge.utils.paths import Typed, is_file
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import is_list_of_texts
from clip_rd_edge.utils.text import is_unicode, shown_source

JSON_KEY = "caption"
SEPARATOR = "::"  # between sources and between weights, as in open_clip


@dataclass(frozen=True)
class Source:
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
        numbers = np.split(np.arange(len(self._paths)), np.cumsum([len(source.shards) for source in sources])[:-1])
        self._shard_of_group = np.concatenate([np.tile(n, w) for n, w in zip(numbers, self._weights, strict=True)])
        self.groups = self._index.samples[self._shard_of_group]
        self._ends = np.cumsum(self.groups)
        self._say_if_the_cache_is_small(reporter)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def counts(self) -> Counts:
        """See `Samples`."""
        return Counts(pairs=len(self)) if self._captioned else Counts(images=len(self))

    def read(self, index: int) -> Sample:
        """See `Samples`; errors name shard and sample."""
        shard, located = self.locate(index)
        captions: tuple[str, ...] = ()
        if self._captioned:
            member = TarMember(shard, "", *located.caption)
            captions = json_captions(member, self._json_key or JSON_KEY) if located.is_json else text_captions(member)
        return Sample(captions, TarMember(shard, "", *located.image))

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify these pairs: digests of names, offsets and sizes of all samples."""
        yield from self._index.identity()
        yield repr((self._weights, self._json_key)).encode()

    def prefetch(self, groups: Sequence[int]) -> None:
        """Begin to fetch the shards of these groups, where they are remote."""
        prefetch([self._paths[shard] for shard in dict.fromkeys(self._shard_of_group[list(groups)].tolist())])

    def _say_if_the_cache_is_small(self, reporter: Reporter) -> None:
        remote = [path for path in self._paths if isinstance(path, RemoteShard)]
        if not remote:
            return
        total = sum(max(version(path).size, 0) for path in remote)
        # An epoch reads one window at random while the next one is fetched; each ends within a shard.
        shards = 2 * (SHUFFLE_WINDOW / max(np.mean(self.groups), 1) + 1)
        needed = min(total, int(total * shards / len(remote)))
        if needed > (limit := cache_limit()):
            reporter.note(
                f"{needed / 1e9:,.2f} GB of shards are in use at a time, but their cache holds {limit / 1e9:,.2f} GB: "
                f"they will be fetched again and again; {LIMIT_VARIABLE} sets another limit"
            )

    def locate(self, index: int) -> tuple[ShardFile, Located]:
        """Return the shard of a sample, and where its files lie in it."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        shard = int(self._shard_of_group[group])
        return self._paths[shard], self._index.locate(shard, index - int(self._ends[group] - self.groups[group]))


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
            f"The weights {weights!r} are not a positive integer for each of {sources} sources: how often it is shown "
            "per epoch.",
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
    match = _BRACES.search(pattern)
    if match is None:
        if "{" in pattern or "}" in pattern:
            raise InputError(f"The pattern {shown_source(pattern)!r} has an unmatched brace.")
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    choices, rests = _choices(match[1], pattern), expand_braces(after)
    _require_few(len(choices) * len(rests), pattern)
    return [before + choice + rest for choice in choices for rest in rests]


def _require_few(names: int, pattern: str) -> None:
    if names > MAX_SHARDS:
        raise InputError(
            f"The pattern {shown_source(pattern)!r} stands for {names:,} names or more; the limit is {MAX_SHARDS:,}.",
            hint="check the range in the braces",
        )


def _choices(content: str, pattern: str) -> list[str]:
    numbers = _RANGE.fullmatch(content)
    if numbers is None:
        if "," not in content:
            raise InputError(
                f"{{{content}}} in {shown_source(pattern)!r} is neither a range nor a list.",
                hint="write {00000..00012} or {train,val}",
            )
        return content.split(",")
    first, last = numbers.groups()
    _require_few(abs(int(last) - int(first)) + 1, pattern)
    # As in a shell, leading zeros on either side set the width of all numbers.
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) and max(len(first), len(last)) > 1 else 0
    step = 1 if int(first) <= int(last) else -1
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]


def text_captions(member: TarMember) -> tuple[str, ...]:
    """Return the whole text of a .txt as one caption, as open_clip does."""
    return _require_captions([read_text(member)], str(member))


def read_json_member(member: TarMember) -> Any:
    """Return the content of a .json, which may have NaN, Infinity and halves of surrogate pairs, as Python writes."""
    text = read_text(member)
    try:
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(text)
        return json.loads(text)  # slower, but reads them
    except ValueError as error:
        raise InputError(f"{member} is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise InputError(f"{member} is not valid JSON for this: its values are nested too deep.") from error


def json_captions(
    member: TarMember, key: str, *, hint: str = "name the key with {json_caption_key}"
) -> tuple[str, ...]:
    """Return the captions at a key of a .json, a string or a list of strings.

    Args:
        hint: what to do if there is no such key.
    """
    content = read_json_member(member)
    if not isinstance(content, dict) or key not in content:
        known = [str(name) for name in content] if isinstance(content, dict) else []
        raise InputError(f"{member} has no key {key!r}.{near_matches(key, known)}", hint=hint)
    value = content[key]
    # img2dataset and exports of tables write null for an empty caption.
    captions = [caption for caption in (value if isinstance(value, list) else [value]) if caption is not None]
    if not all(isinstance(caption, str) for caption in captions):
        raise InputError(f"{member}: {key!r} is neither a string nor a list of strings.")
    if not all(map(is_unicode, captions)):
        raise InputError(f"{member}: {key!r} is no Unicode.")
    return _require_captions(captions, str(member))


def _require_captions(captions: Sequence[str], location: str) -> tuple[str, ...]:
    """Return the captions that are not empty, stripped; raise InputError if there are none, or one is a list."""
    non_empty = tuple(stripped for caption in captions if (stripped := caption.strip()))
    if not non_empty:
        raise InputError(f"{location}: the caption is empty.")
    if any(map(is_list_of_texts, non_empty)):
        raise InputError(f"{location}: the caption is the text of a list; expected the list itself, in a .json.")
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
