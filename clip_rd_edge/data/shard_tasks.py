"""Tasks from WebDataset shards as CLIP_benchmark exports them: `0.tar` … with .cls for classes or .txt for captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clip_rd_edge.contract.task import RetrievalTask, Task, ZeroShotTask
from clip_rd_edge.data.metadata import CLASS_NAMES, SHARD_COUNT, DataSet
from clip_rd_edge.data.sidecars import read_text
from clip_rd_edge.data.tars import Kind, Shard, TarMember, open_shard
from clip_rd_edge.data.templates import Fallback
from clip_rd_edge.errors import InputError


def shard_task(data: DataSet, fallback: Fallback) -> Task:
    """The task of a data set in shards.

    Raises:
        InputError: a shard, class name, class or caption is missing or does not fit, or the data set has several labels
            a picture. An evaluation on part of the pictures would be another evaluation: nothing is passed over.
    """
    shards = [open_shard(path) for path in _shards(data)]
    kind = data.kind() or ("retrieval" if not any(shard.has("class").any() for shard in shards) else "classification")
    if kind == "retrieval":
        return retrieval_from_shards(data.name, shards)
    if kind != "classification":
        raise InputError(f"{data.root} is of the type {kind!r}; only classification and retrieval are evaluated.")
    return _zero_shot(data, shards, fallback)


def retrieval_from_shards(name: str, shards: Sequence[Shard]) -> RetrievalTask:
    """Each picture with all the captions that its .txt has, one a line; raises as `shard_task`."""
    images: list[TarMember] = []
    captions: list[str] = []
    of_image: list[int] = []
    for picture, text in _members(shards, "text"):
        lines = [line.strip() for line in read_text(text).splitlines() if line.strip()]
        if not lines:
            raise InputError(f"{text} has no caption.")
        captions += lines
        of_image += [len(images)] * len(lines)
        images.append(picture)
    return RetrievalTask(name=name, images=tuple(images), captions=tuple(captions), caption_images=tuple(of_image))


def _zero_shot(data: DataSet, shards: Sequence[Shard], fallback: Fallback) -> ZeroShotTask:
    labels = data.labels()
    if not labels:
        raise InputError(f"{data.root} has no {CLASS_NAMES}, which says what the classes' numbers mean.")
    images: list[TarMember] = []
    targets: list[int] = []
    for picture, member in _members(shards, "class"):
        said = read_text(member).strip()
        if not said.isdecimal() or int(said) >= len(labels):
            raise InputError(f"{member} says {said!r}; expected a number below {len(labels)}, the number of classes.")
        images.append(picture)
        targets.append(int(said))
    templates = data.templates(fallback)
    return ZeroShotTask(
        name=data.name,
        images=tuple(images),
        targets=tuple(targets),
        labels=tuple(labels),
        templates=templates.prompts,
        templates_from=templates.origin,
    )


def _shards(data: DataSet) -> list[Path]:
    """As many as nshards.txt says, else every tar in the order of its name."""
    count = data.split / SHARD_COUNT
    if not count.is_file():
        return sorted(data.split.glob("*.tar"))
    said = count.read_text(encoding="utf-8").strip()
    if not said.isdecimal() or int(said) < 1:
        raise InputError(f"{count} says {said!r}; expected the number of shards.")
    return [data.split / f"{number}.tar" for number in range(int(said))]


def _members(shards: Sequence[Shard], kind: Kind) -> list[tuple[TarMember, TarMember]]:
    """Picture and class or text of every sample."""
    found: list[tuple[TarMember, TarMember]] = []
    for shard in shards:
        if shard.damage:
            raise InputError(f"{shard.path}: {shard.damage}.", hint="copy the shard again")
        for index in range(len(shard)):
            picture, other = shard.member(index, "picture"), shard.member(index, kind)
            if picture is None or other is None:
                lacking = "picture" if picture is None else kind
                raise InputError(f"{shard.path}: {shard.name(index)} has no {lacking}.")
            found.append((picture, other))
    return found
