"""What an encoder is measured on: pictures with labels, and pictures with captions."""

from __future__ import annotations

import msgspec

from clip_rd_edge.contract.images import ImageFile


class ZeroShotTask(msgspec.Struct, frozen=True, kw_only=True):
    """Zero-shot classification.

    Attributes:
        name: as a report shows it.
        images: the N pictures.
        targets: N indices into `labels`.
        labels: the C class names.
        templates: prompts with one `{}`, averaged a class.
        templates_from: whose they are, as a report says it, or empty.
    """

    name: str
    images: tuple[ImageFile, ...]
    targets: tuple[int, ...]
    labels: tuple[str, ...]
    templates: tuple[str, ...] = ("{}",)
    templates_from: str = ""


class RetrievalTask(msgspec.Struct, frozen=True, kw_only=True):
    """Image-text retrieval with all the captions that a picture has.

    Attributes:
        images: the N pictures.
        captions: the M captions.
        caption_images: for each caption, the index of the picture that it belongs to.
    """

    name: str
    images: tuple[ImageFile, ...]
    captions: tuple[str, ...]
    caption_images: tuple[int, ...]


Task = ZeroShotTask | RetrievalTask
