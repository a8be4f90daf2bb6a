"""The templates of data sets that have none: CLIP's 80 for ImageNet where open_clip is installed."""

from __future__ import annotations

from clip_rd_edge.data.clip_benchmark import Templates, neutral


def imagenet_templates() -> Templates:
    """open_clip's OPENAI_IMAGENET_TEMPLATES, else a neutral one; whoever asks for them pays for importing torch."""
    try:
        from open_clip import OPENAI_IMAGENET_TEMPLATES
    except ImportError:
        return neutral()
    return Templates(tuple(fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES), "ImageNet's, from open_clip")
