"""Evaluation tasks: images with class labels, and images with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from clip_rd_edge.bundle.images import ImageFile
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
        """What is asked about the images; its repr is part of digests that are kept, so the order must stay."""
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

    @property
    def questions(self) -> tuple[object, ...]:
        """See `ZeroShotTask.questions`."""
        return self.captions, self.caption_images

    def first_captions(self) -> dict[int, int]:
        """Return the index of the first caption of each image that has one, by the index of the image."""
        return {image: caption for caption, image in reversed([*enumerate(self.caption_images)])}


Task = ZeroShotTask | RetrievalTask


def with_distinct_names(tasks: Sequence[Task], sources: Sequence[str]) -> list[Task]:
    """Rename tasks of the same name, such as those of `a/val.csv` and `b/val.csv`, to the parts of their source that
    differ.

    Args:
        sources: the path or name that each task was loaded from.
    """
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
