"""The best student so far by the run's own evaluations, kept beside the last: `RUN/best`, an open_clip local-dir."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from clip_rd_edge.contract.checkpoint import DISTILLATION_FILE
from clip_rd_edge.models.checkpoint import save_clip
from clip_rd_edge.models.clip import ClipModel

BEST_FOLDER = "best"


class _Record(msgspec.Struct):
    evaluation: dict[str, float]


def keep_if_best(
    run: Path, student: ClipModel, evaluation: Mapping[str, float], *, provenance: Callable[[], dict[str, Any]]
) -> bool:
    """Write the student to `RUN/best` where the mean of its figures is above that of the one there.

    Args:
        evaluation: a figure a task, greater is better.
        provenance: gives what its distillation.json is to say, to which the evaluation is added; asked only where it
            is written, since it takes the hash of the teacher's weights.

    Returns:
        whether it was written.
    """
    path = run / BEST_FOLDER / DISTILLATION_FILE
    if path.is_file():
        before = msgspec.json.decode(path.read_bytes(), type=_Record).evaluation
        if statistics.fmean(evaluation.values()) <= statistics.fmean(before.values()):
            return False
    save_clip(run / BEST_FOLDER, student, provenance={**provenance(), "evaluation": dict(evaluation)})
    return True
