"""The public Python API: one function per command, re-exported by `clip_rd_edge`.

Heavy packages are imported on first use: PyTorch takes seconds to import and is not installed on devices.
"""

from __future__ import annotations

from clip_rd_edge.api.exporting import ExportedBundle, export, targets, verify
from clip_rd_edge.api.measuring import (
    benchmark,
    compare,
    evaluate,
    evidence_report,
    evidence_run,
    load_tasks,
    quickstart,
    recommend,
)
from clip_rd_edge.api.models import first_answer, load, open_encoder, stitch, trim
from clip_rd_edge.api.running import demo, doctor, index, search, serve, watch_index
from clip_rd_edge.api.training import average, distill, embed, recipe

__all__ = [
    "ExportedBundle",
    "average",
    "benchmark",
    "compare",
    "demo",
    "distill",
    "doctor",
    "embed",
    "evaluate",
    "evidence_report",
    "evidence_run",
    "export",
    "first_answer",
    "index",
    "load",
    "load_tasks",
    "open_encoder",
    "quickstart",
    "recipe",
    "recommend",
    "search",
    "serve",
    "stitch",
    "targets",
    "trim",
    "verify",
    "watch_index",
]
