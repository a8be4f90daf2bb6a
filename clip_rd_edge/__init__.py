"""clip-rd-edge: distil, quantise and run CLIP models on small devices.

>>> import clip_rd_edge as edge
>>> model = edge.load("bundle")
>>> model.classify("photo.jpg", labels=["a bicycle", "a dog"])

Importing this package is cheap: each name below is imported on first use.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_rd_edge.api.exporting import ExportedBundle, export, targets, verify
    from clip_rd_edge.api.measuring import (
        benchmark,
        compare,
        evaluate,
        evidence_report,
        evidence_run,
        quickstart,
        recommend,
    )
    from clip_rd_edge.api.models import load, stitch, trim
    from clip_rd_edge.api.running import demo, doctor, index, search, serve, teach, watch_index
    from clip_rd_edge.api.training import BuiltBundle, average, build, distill, embed, pack, recipe
    from clip_rd_edge.errors import (
        ClipRdEdgeError,
        ConfigError,
        InputError,
        InterruptedRunError,
        MissingExtraError,
        UnreachableError,
        UsageError,
    )
    from clip_rd_edge.runtime.classifier import Prediction, ZeroShotClassifier
    from clip_rd_edge.runtime.model import Model
    from clip_rd_edge.utils.text import Reporter

__version__ = "0.1.0"

# From 1.29 on, ONNX Runtime sends what it runs to its makers, and keeps a number of the machine in the user's cache. It
# reads this variable once, when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Where each name is defined; errors, which are named so, in `errors`.
_HOMES = {
    "api.exporting": ("ExportedBundle", "export", "targets", "verify"),
    "api.measuring": (
        "benchmark", "compare", "evaluate", "evidence_report", "evidence_run", "quickstart", "recommend",
    ),
    "api.models": ("load", "stitch", "trim"),
    "api.running": ("demo", "doctor", "index", "search", "serve", "teach", "watch_index"),
    "api.training": ("BuiltBundle", "average", "build", "distill", "embed", "pack", "recipe"),
    "runtime.classifier": ("Prediction", "ZeroShotClassifier"),
    "runtime.model": ("Model",),
    "utils.text": ("Reporter",),
}  # fmt: skip

__all__ = [
    "BuiltBundle",
    "ClipRdEdgeError",
    "ConfigError",
    "ExportedBundle",
    "InputError",
    "InterruptedRunError",
    "MissingExtraError",
    "Model",
    "Prediction",
    "Reporter",
    "UnreachableError",
    "UsageError",
    "ZeroShotClassifier",
    "average",
    "benchmark",
    "build",
    "compare",
    "demo",
    "distill",
    "doctor",
    "embed",
    "evaluate",
    "evidence_report",
    "evidence_run",
    "export",
    "index",
    "load",
    "pack",
    "quickstart",
    "recipe",
    "recommend",
    "search",
    "serve",
    "stitch",
    "targets",
    "teach",
    "trim",
    "verify",
    "watch_index",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    home = next((home for home, names in _HOMES.items() if name in names), "errors")
    value = getattr(importlib.import_module(f"clip_rd_edge.{home}"), name)
    globals()[name] = value  # later accesses bypass __getattr__
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
