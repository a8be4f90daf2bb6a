"""Folders for other programs, which are made of bundles. One module per layout, imported when it is used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from clip_rd_edge.errors import UsageError

if TYPE_CHECKING:
    from clip_rd_edge.bundle.formats import Precision
    from clip_rd_edge.bundle.preprocess import Preprocessing
    from clip_rd_edge.exporting.plan import Plan
    from clip_rd_edge.models.clip import ClipModel
    from clip_rd_edge.settings.deploying import Export

LAYOUTS = {
    "huggingface": "clip_rd_edge.exporting.layouts.huggingface:HuggingFace",
    "immich": "clip_rd_edge.exporting.layouts.immich:Immich",
    "browser": "clip_rd_edge.exporting.layouts.browser:Browser",
}


class Layout(ABC):
    """What is written in place of a bundle."""

    def precisions(self, plan: Plan) -> tuple[Precision, ...]:
        """Return the precisions of the bundles that it is made of; the last is the plan's own."""
        return (plan.precision,)

    def check_model(self, clip: ClipModel, request: Export) -> None:
        """Raise UsageError if the layout cannot hold a model, before it is exported."""
        return None

    @abstractmethod
    def write(self, bundles: Mapping[str, Path], folder: Path, clip: ClipModel, request: Export) -> None:
        """Write the layout of bundles, by precision, into a folder."""


def require_square(preprocessing: Preprocessing, name: str, *, modes: tuple[str, ...] = ()) -> None:
    """Raise UsageError unless the model `name` takes squares, or resizes in one of the modes, but for `longest`."""
    (height, width), mode = preprocessing.size, preprocessing.resize_mode
    if mode == "longest" or (height != width and mode not in modes):
        raise UsageError(
            "The programs that read this layout preprocess images themselves: they crop or squash them to a square; "
            f"{name} takes {height} × {width} with resize mode {mode}.",
            hint="omit {layout}",
        )
