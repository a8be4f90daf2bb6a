"""Prompts for data sets that bring none.

CLIP's 80 for ImageNet come with open_clip, which needs torch: what may import it passes them in as a `Fallback`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


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
