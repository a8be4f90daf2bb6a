"""Prompts for data sets that bring none.

CLIP's 80 for ImageNet come with open_clip, which needs torch: what may import it passes them in as a `Fallback`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_rd_edge.contract.images import IMAGE_SUFFIXES
from clip_rd_edge.contract.task import RetrievalTask, Task, ZeroShotTask
from clip_rd_edge.data.tars import Kind, Shard, TarMember, open_shard
from clip_rd_edge.data.webdataset import read_text
from clip_rd_edge.errors import InputError


@dataclass(frozen=True)
class Templates:
    """Prompts with one `{}` (or `{c}`) for a label's name, and whose they are, as a report says it."""

    prompts: tuple[str, ...]
    origin: str


Fallback = Callable[[], Templates]  # called only where a data set has no templates of its own
NEUTRAL = Templates(("a photo of a {}.",), "neutral")


def neutral() -> Templates:
    """One prompt that fits most things."""
    return NEUTRAL


CLASS_NAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
SHARD_COUNT = "nshards.txt"
SPLITS = ("test", "val", "validation")  # the first that is there


@dataclass(frozen=True)
class DataSet:
    """A folder with a data set: `root` has what is said of it, `split` its pictures; they may be the same."""

    root: Path
    split: Path

    @property
    def name(self) -> str:
        """As reports show it: the folder's name without what CLIP_benchmark puts before it."""
        return self.root.resolve().name.removeprefix("wds_").removeprefix("vtab-")

    @property
    def in_shards(self) -> bool:
        """Whether the split's pictures are in tars."""
        return _in_shards(self.split)

    def labels(self) -> list[str]:
        """The class names, or none where there is no classnames.txt."""
        return self._lines(CLASS_NAMES)

    def templates(self, fallback: Fallback) -> Templates:
        """The data set's own, else the fallback's."""
        own = self._lines(TEMPLATES)
        return Templates(tuple(own), "the data set's") if own else fallback()

    def kind(self) -> str:
        """`classification`, `retrieval`, …, or empty where it does not say."""
        lines = self._lines(TYPE)
        return lines[0].lower() if lines else ""

    def place(self, name: str) -> Path:
        """Where a file is, at the root or beside the pictures; it need not be there."""
        beside = self.split / name
        return beside if beside.is_file() and not (self.root / name).is_file() else self.root / name

    def _lines(self, name: str) -> list[str]:
        path = self.place(name)
        if not path.is_file():
            return []
        # A line's number is a class's: an empty line in the middle is kept, to be found missing rather than skipped.
        lines = [line.strip() for line in path.read_text(encoding="utf-8").strip().splitlines()]
        if "" in lines:
            raise InputError(f"{path}, line {lines.index('') + 1}, is empty.")
        return lines


def find_data_set(folder: Path) -> DataSet:
    """The data set that a folder is, or whose split it is."""
    for name in SPLITS:
        # A class may be called `test`, too: a split has folders or shards in it, a class has pictures.
        split = folder / name
        if split.is_dir() and (_in_shards(split) or any(path.is_dir() for path in split.iterdir())):
            return DataSet(folder, split)
    above = folder.resolve().parent
    if folder.resolve().name in SPLITS and any((above / name).is_file() for name in (CLASS_NAMES, TEMPLATES, TYPE)):
        return DataSet(above, folder)
    return DataSet(folder, folder)


def _in_shards(folder: Path) -> bool:
    return (folder / SHARD_COUNT).is_file() or any(folder.glob("*.tar"))


_WORDNET_ID = re.compile(r"n\d{8}")


def image_folder_task(data: DataSet, fallback: Fallback) -> ZeroShotTask:
    """Tell each picture of CLASS/…/picture.jpg among the classes.

    Raises:
        InputError: no pictures, class names that do not match the sub-folders, or sub-folders named by WordNet ids
            without class names.
    """
    classes = _in_order([path for path in data.split.iterdir() if path.is_dir() and not path.name.startswith(".")])
    labels = data.labels() or [path.name.replace("_", " ") for path in classes]
    if len(labels) != len(classes):
        raise InputError(f"{data.place(CLASS_NAMES)} has {len(labels)} names for {len(classes)} sub-folders.")
    if classes and labels == [path.name for path in classes] and all(map(_WORDNET_ID.fullmatch, labels)):
        raise InputError(
            f"The sub-folders of {data.split} are named by WordNet ids, such as {labels[0]}, which say nothing to a "
            f"text tower.",
            hint=f"write the classes' names into {data.root / CLASS_NAMES}, one a line, in the order of the ids",
        )
    found = [
        (path, target)
        for target, subfolder in enumerate(classes)
        for path in sorted(subfolder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not found:
        raise InputError(f"{data.split} has no pictures in sub-folders; expected CLASS/picture.jpg.")
    templates = data.templates(fallback)
    return ZeroShotTask(
        name=data.name,
        images=tuple(path for path, _ in found),
        targets=tuple(target for _, target in found),
        labels=tuple(labels),
        templates=templates.prompts,
        templates_from=templates.origin,
    )


def _in_order(classes: list[Path]) -> list[Path]:
    """By name; by number where all names are numbers: ImageNet-V2's folders are 0 to 999, one a class."""
    if all(path.name.isdecimal() for path in classes):
        return sorted(classes, key=lambda path: int(path.name))
    return sorted(classes)


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
