"""Evaluation tasks: images with class labels, and images with captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from clip_rd_edge.bundle.image_files import is_ignored, list_images
from clip_rd_edge.bundle.images import ImageFile
from clip_rd_edge.bundle.labels import Templates, imagenet_templates
from clip_rd_edge.data.folders import CLASS_NAMES, SPLITS, class_folders, class_name, metadata_lines, subfolders
from clip_rd_edge.data.load import names_shards
from clip_rd_edge.data.shard_files import TarMember, ask_versions
from clip_rd_edge.data.shard_index import Shard, open_shard
from clip_rd_edge.data.tables import Table, load_table
from clip_rd_edge.data.tar import Kind
from clip_rd_edge.data.webdataset import JSON_KEY, MAX_SHARDS, json_captions, parse_sources, read_text, require_captions
from clip_rd_edge.errors import InputError, near_matches, quoted
from clip_rd_edge.utils.files import read_text_limited, text_lines
from clip_rd_edge.utils.paths import Typed, is_file, is_folder, near_files, sorted_paths
from clip_rd_edge.utils.structs import is_natural
from clip_rd_edge.utils.text import shown_source


class ZeroShotTask(msgspec.Struct, frozen=True, kw_only=True):
    """A zero-shot classification task.

    Attributes:
        name: as shown in reports.
        images: N images.
        targets: N indices into `labels`.
        labels: C class names.
        folders: names of the C folders of images, if the classes have other names than these; else empty.
        templates: prompt templates with one `{}`; a class embedding is the mean over them.
        templates_from: origin of the templates as shown in reports, or empty.
    """

    name: str
    images: tuple[ImageFile, ...]
    targets: tuple[int, ...]
    labels: tuple[str, ...]
    templates: tuple[str, ...] = ("{}",)
    templates_from: str = ""
    folders: tuple[str, ...] = ()

    @property
    def questions(self) -> tuple[object, ...]:
        """What is asked about the images; digests that are kept include its repr, so the order must stay."""
        return self.targets, self.labels, self.templates


class RetrievalTask(msgspec.Struct, frozen=True, kw_only=True):
    """An image-text retrieval task; an image may have several captions.

    Attributes:
        name: as shown in reports.
        images: N images.
        captions: M captions.
        caption_images: for each caption, the index of its image.
    """

    name: str
    images: tuple[ImageFile, ...]
    captions: tuple[str, ...]
    caption_images: tuple[int, ...]

    @classmethod
    def of(cls, name: str, images: Sequence[ImageFile], pairs: Sequence[tuple[str, int]]) -> RetrievalTask:
        """Return the task of captions, each with the number of its image."""
        captions, numbers = zip(*pairs, strict=True) if pairs else ((), ())
        return cls(name=name, images=tuple(images), captions=captions, caption_images=numbers)

    @property
    def questions(self) -> tuple[object, ...]:
        return self.captions, self.caption_images

    def first_captions(self) -> dict[int, int]:
        """Return the index of the first caption of each image that has one, by the index of the image."""
        return {image: caption for caption, image in reversed([*enumerate(self.caption_images)])}


Task = ZeroShotTask | RetrievalTask


def with_distinct_names(tasks: Sequence[Task], sources: Sequence[str]) -> list[Task]:
    """Rename tasks of the same name, such as those of `a/val.csv` and `b/val.csv`, to the parts of their source that
    differ."""
    renamed = list(tasks)
    for name in {task.name for task in tasks}:
        same = [number for number, task in enumerate(tasks) if task.name == name]
        if len(same) == 1:
            continue
        parts = [Path(shown_source(sources[number])).parts for number in same]
        common = next((i for i, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), len(parts[0]))
        for number, path in zip(same, parts, strict=True):
            renamed[number] = msgspec.structs.replace(
                tasks[number], name=Path(*path[common:]).as_posix() if common < len(path) else name
            )
    return renamed


BUILT_IN_TASKS = (
    "emoji:unseen-style",
    "emoji:unseen-concepts",
    "emoji:unseen-style:retrieval",
    "emoji:unseen-concepts:retrieval",
)


def load_task(name: Typed, *, image_key: str = "filepath", caption_key: str = "title") -> Task:
    """Load a task. `name` is one of:

    - A name in BUILT_IN_TASKS: a task of the built-in data set.
    - A folder with one subfolder of images per class, as in torchvision. The classes are the subfolders in alphabetical
      order, or in numerical order if all names are numbers. Its subfolder `test`, or else `val`, is used if it exists.
    - A folder of WebDataset shards as exported by CLIP_benchmark: `test/nshards.txt`, `test/0.tar`, …
    - Pairs, for retrieval: a table (CSV, TSV or Parquet), or shards (`val/{000..003}.tar`). An image in several lines
      of a table has several captions.

    Metadata files that may accompany the images are described by `data.tasks.DataSet`.
    """
    if name in BUILT_IN_TASKS:
        from clip_rd_edge.data import emoji

        split: emoji.Split = "unseen style" if "unseen-style" in name else "unseen concepts"
        return emoji.retrieval_task(split) if name.endswith(":retrieval") else emoji.zero_shot_task(split)
    if names_shards(name):
        paths = [path for source in parse_sources(name) for path in source.shards]
        ask_versions(paths)
        return retrieval_from_shards(shown_source(name), list(map(open_shard, paths)))
    path = Path(name)
    if is_file(path):
        return _from_table(load_table(path, image_key=image_key, caption_key=caption_key), path.stem)
    if not name or not is_folder(path):  # an empty name would be this folder
        raise InputError(
            f"No task named {quoted(shown_source(name))}: it is neither a folder of images nor one of "
            f"{', '.join(BUILT_IN_TASKS)}.{near_matches(name, BUILT_IN_TASKS) or near_files(path)}",
            hint="check the path: a task is a folder with one subfolder of images per class, or a table of captions",
        )
    data_set = find_data_set(path)
    return shard_task(data_set) if _is_sharded(data_set.split) else image_folder_task(data_set)


def _from_table(table: Table, name: str) -> RetrievalTask:
    """Return the retrieval task of a table. No row is left out: that would change the evaluation."""
    if table.problems.count:
        raise InputError(
            f"{table.problems.examples[0]}.", hint="fix or remove the row: a task is evaluated on all of its rows"
        )
    index_of = dict[Path, int]()  # an image may have several paths
    rows = map(table.pair, range(len(table)))
    pairs = [(row.caption, index_of.setdefault(row.path.resolve(), len(index_of))) for row in rows]
    return RetrievalTask.of(name, list(index_of), pairs)


TEMPLATES, TYPE = "zeroshot_classification_templates.txt", "dataset_type.txt"
SHARD_COUNT = "nshards.txt"


class DataSet(NamedTuple):
    """A data set folder: `root` holds its metadata and `split` its images; they may be the same folder."""

    root: Path
    split: Path

    @property
    def name(self) -> str:
        """The folder's name without CLIP_benchmark's prefixes, as shown in reports."""
        return self.root.resolve().name.removeprefix("wds_").removeprefix("vtab-")

    def task(
        self, images: Sequence[ImageFile], targets: Sequence[int], labels: Sequence[str], folders: Sequence[str] = ()
    ) -> ZeroShotTask:
        """Return the zero-shot task of its images, with its own templates, or else CLIP's for ImageNet."""
        own = metadata_lines(self.metadata_path(TEMPLATES))
        templates = Templates(tuple(own), "the data set's") if own else imagenet_templates()
        return ZeroShotTask(
            name=self.name,
            images=tuple(images),
            targets=tuple(targets),
            labels=tuple(labels),
            templates=templates.prompts,
            templates_from=templates.origin,
            folders=tuple(folders),
        )

    def metadata_path(self, name: str) -> Path:
        """Return the path of a metadata file, at the root or beside the images; it may not exist."""
        beside = self.split / name
        return beside if beside.is_file() and not (self.root / name).is_file() else self.root / name


def find_data_set(folder: Path) -> DataSet:
    """Return the data set in a folder, which may be its root or one of its splits."""
    for name in SPLITS:
        # A class may be called `test` too: a split contains folders or shards, a class contains images.
        split = folder / name
        if split.is_dir() and (_is_sharded(split) or subfolders(split)):
            return DataSet(folder, split)
    parent = folder.resolve().parent
    if folder.resolve().name in SPLITS and any((parent / name).is_file() for name in (CLASS_NAMES, TEMPLATES, TYPE)):
        return DataSet(parent, folder)
    return DataSet(folder, folder)


def _is_sharded(folder: Path) -> bool:
    if (folder / SHARD_COUNT).is_file():
        return True
    # A tar beside folders of images is the archive that they come from.
    return bool(_tars(folder)) and not any(map(list_images, subfolders(folder)))


def _tars(folder: Path) -> list[Path]:
    return sorted_paths(path for path in folder.glob("*.tar") if not is_ignored(path.name))


def image_folder_task(data_set: DataSet) -> ZeroShotTask:
    """Return the zero-shot task of a data set with one subfolder of images per class, CLASS/…/image.jpg."""
    classes = class_folders(data_set.split, data_set.metadata_path(CLASS_NAMES))
    samples = [(path, target) for target, (folder, _) in enumerate(classes) for path in list_images(folder)]
    if not samples:
        raise InputError(
            f"{data_set.split} has no images in subfolders; expected CLASS/image.jpg.",
            hint="put the images of each class into a subfolder with the name of the class",
        )
    images, targets = zip(*samples, strict=True)
    folders, labels = zip(*classes, strict=True)
    has_own_names = tuple(map(class_name, folders)) == labels
    return data_set.task(images, targets, labels, () if has_own_names else [folder.name for folder in folders])


def shard_task(data_set: DataSet) -> Task:
    """Return the task of a data set in shards. No sample is skipped: that would change the evaluation."""
    shards = [open_shard(path) for path in _shard_paths(data_set.split)]
    stated = metadata_lines(data_set.metadata_path(TYPE))
    guess = "classification" if any(shard.has("class").any() for shard in shards) else "retrieval"
    if (stated[0].lower() if stated else guess) == "retrieval":
        return retrieval_from_shards(data_set.name, shards)
    names = data_set.metadata_path(CLASS_NAMES)
    labels, images, targets = metadata_lines(names), list[ImageFile](), list[int]()
    for image, member in _samples(shards, "class"):
        target = read_text(member).strip()
        if not is_natural(target) or int(target) >= len(labels):
            raise InputError(
                f"{member} contains {target!r}; expected a number below {len(labels)}, the lines of {names}."
            )
        images.append(image)
        targets.append(int(target))
    return data_set.task(images, targets, labels)


_CAPTION_HINT = f"write captions into a .txt of each sample, one per line, or into its .json at the key {JSON_KEY!r}"


def retrieval_from_shards(name: str, shards: Sequence[Shard]) -> RetrievalTask:
    """Return the retrieval task of shards with all captions in each .txt, one per line, or else in each .json."""
    images, pairs = list[ImageFile](), list[tuple[str, int]]()
    for image, member in _samples(shards, "text", "json"):
        if member.name.endswith(".json"):
            captions = json_captions(member, JSON_KEY, hint=_CAPTION_HINT)
        else:
            captions = require_captions(text_lines(read_text(member)), str(member))
        pairs += [(caption, len(images)) for caption in captions]
        images.append(image)
    return RetrievalTask.of(name, images, pairs)


def _shard_paths(folder: Path) -> list[Path]:
    """Return the paths of the shards: as many as nshards.txt states, or else all tars, sorted by name."""
    if not (count_file := folder / SHARD_COUNT).is_file():
        return _tars(folder)
    count = read_text_limited(count_file).strip()
    if not is_natural(count) or not 1 <= int(count) <= MAX_SHARDS:
        raise InputError(f"{count_file} contains {count!r}; expected the number of shards.")
    return [folder / f"{number}.tar" for number in range(int(count))]


def _samples(shards: Sequence[Shard], *kinds: Kind) -> Iterator[tuple[TarMember, TarMember]]:
    """Yield the image of every sample, and its class or text: of these kinds of files, the first that it has."""
    for shard in shards:
        if shard.damage:
            raise InputError(f"{shard.path}: {shard.damage}.", hint="copy the shard again")
        for index in range(len(shard)):
            files = shard.files(index)
            other = next((kind for kind in kinds if kind in files), kinds[0])
            if missing := {"image", other} - files.keys():
                hint = _CAPTION_HINT if "text" in missing else ""
                raise InputError(f"{shard.path}: {shard.name(index)} has no {min(missing)}.", hint=hint)
            yield files["image"], files[other]
