"""What a run writes down: one line a log step in metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from clip_rd_edge.losses.objective import EmbeddingBatch
from clip_rd_edge.utils.host import peak_memory_bytes
from clip_rd_edge.utils.io import write_bytes

FILE = "metrics.jsonl"
EVALUATION = "evaluation/"


@dataclass(frozen=True)
class Progress:
    """What a progress line shows after a step.

    Attributes:
        data_wait: share of the time spent waiting for batches.
        skipped: steps that were not made, since the loss or a gradient was not finite.
        bad: samples left out or passed over since the start or resume, in all processes.
        memory_bytes: see `peak_memory_on`.
    """

    step: int
    steps: int
    loss: float
    samples_per_second: float
    data_wait: float
    evaluation: dict[str, float]
    bad: int = 0
    skipped: int = 0
    memory_bytes: int = 0


class MetricsLog:
    """Appends to metrics.jsonl; a resumed run first drops what lies after its checkpoint."""

    def __init__(self, run: Path, *, start: int) -> None:
        self._path = run / FILE
        kept = [line for line in read_metrics(run) if line["step"] <= start]
        write_bytes(self._path, b"".join(msgspec.json.encode(line) + b"\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, at once on disk."""
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl; a last line that was cut off while written is left out."""
    path = run / FILE
    lines = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            lines.append(msgspec.json.decode(line))
        except msgspec.DecodeError:
            break
    return lines


def last_evaluation(run: Path) -> dict[str, float]:
    """Figures of a run's last evaluation by task; empty where there was none."""
    lines = [line for line in read_metrics(run) if any(name.startswith(EVALUATION) for name in line)]
    return {name.removeprefix(EVALUATION): v for name, v in lines[-1].items() if EVALUATION in name} if lines else {}


def step_line(
    progress: Progress, terms: Mapping[str, Tensor], embeddings: EmbeddingBatch, extra: Mapping[str, float]
) -> dict[str, Any]:
    """One line of metrics.jsonl; a loss that is not finite is null."""
    return {
        "step": progress.step,
        "loss": progress.loss if math.isfinite(progress.loss) else None,
        **{f"loss/{name}": term.item() for name, term in terms.items()},
        **geometry(embeddings),
        **extra,
        "samples_per_second": round(progress.samples_per_second, 2),
        "data_wait": round(progress.data_wait, 4),
        "memory_mb": round(progress.memory_bytes / 1e6),
        "bad_samples": progress.bad,
        "skipped_steps": progress.skipped,
        **{f"{EVALUATION}{name}": value for name, value in progress.evaluation.items()},
    }


def peak_memory_on(device: torch.device) -> int:
    """The most bytes this process has held: the GPU's where it computes there, else the machine's; 0 where unknown."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes() or 0


@torch.no_grad()
def geometry(batch: EmbeddingBatch) -> dict[str, float]:
    """Mean cosine of positive pairs, of negative pairs, and their gap, for student and teacher."""
    sides = {"student": (batch.student_image, batch.student_text)}
    if batch.teacher_image is not None and batch.teacher_text is not None:
        sides["teacher"] = (batch.teacher_image, batch.teacher_text)
    result = {}
    for name, (image, text) in sides.items():
        positive, negative = pair_similarities(image, text)
        result[f"{name}_positive"] = positive.mean().item()
        result[f"{name}_negative"] = negative.mean().item()
        result[f"{name}_gap"] = result[f"{name}_positive"] - result[f"{name}_negative"]
    return result


def pair_similarities(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of the B positive and the B·(B − 1) negative pairs of a batch."""
    similarity = image.float() @ text.float().T
    diagonal = torch.eye(len(image), dtype=torch.bool, device=image.device)
    return similarity[diagonal], similarity[~diagonal]
