"""Run a bundle on a device, without torch.

>>> from clip_rd_edge.runtime import ZeroShotClassifier, load
>>> classifier = ZeroShotClassifier(load("bundle"), labels=["a cat", "a dog"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_rd_edge.runtime.classifier import Prediction, ZeroShotClassifier
    from clip_rd_edge.runtime.loading import load

__all__ = ["Prediction", "ZeroShotClassifier", "load"]


def __getattr__(name: str) -> Any:
    # Lazy, so that importing a leaf of this package does not import onnxruntime.
    if name == "load":
        from clip_rd_edge.runtime.loading import load

        return load
    if name in __all__:
        from clip_rd_edge.runtime import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
