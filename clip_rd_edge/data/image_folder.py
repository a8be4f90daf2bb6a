"""Zero-shot tasks from pictures in one sub-folder a class, as torchvision and CLIP_benchmark lay them out."""

from __future__ import annotations

import re
from pathlib import Path

from clip_rd_edge.contract.images import IMAGE_SUFFIXES
from clip_rd_edge.contract.task import ZeroShotTask
from clip_rd_edge.data.metadata import CLASS_NAMES, DataSet
from clip_rd_edge.data.templates import Fallback
from clip_rd_edge.errors import InputError

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
