"""Evaluation tasks: images with class labels, and images with captions."""

from __future__ import annotations

import msgspec

from clip_rd_edge.contract.images import ImageFile


class ZeroShotTask(msgspec.Struct, frozen=True, kw_only=True):
    """A zero-shot classification task.

    Attributes:
        name: as shown in reports.
        images: N images.
        targets: N indices into `labels`.
        labels: C class names.
        templates: prompt templates with one `{}`; a class embedding is the mean over them.
        templates_from: origin of the templates as shown in reports, or empty.
    """

    name: str
    images: tuple[ImageFile, ...]
    targets: tuple[int, ...]
    labels: tuple[str, ...]
    templates: tuple[str, ...] = ("{}",)
    templates_from: str = ""


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


Task = ZeroShotTask | RetrievalTask
