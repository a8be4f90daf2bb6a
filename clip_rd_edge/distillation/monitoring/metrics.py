"""Logging of a run: metrics.jsonl with one line per logged step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from clip_rd_edge.bundle.runs import EVALUATION_PREFIX, METRICS_FILE, TERM_PREFIX, read_metrics
from clip_rd_edge.losses.objective import EmbeddingBatch
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.host import peak_memory_bytes


@dataclass(frozen=True)
class Progress:
    """Progress of a run after a step.

    Attributes:
        step, steps: completed steps, and steps in total.
        samples_per_second: without the time of evaluations.
        data_wait: fraction of the time, without that of evaluations, spent waiting for batches.
        seconds_per_step: with evaluations and all else between steps, for the time left.
        evaluation: scores by task; empty if this step was not evaluated.
        bad: samples left out, or skipped so far, in all processes.
        skipped: steps that left the weights unchanged because the loss or a gradient was not finite.
        memory_bytes: see `peak_memory_on`.
        samples: what the rows of a batch are called.
    """

    step: int
    steps: int
    loss: float
    samples_per_second: float
    data_wait: float
    seconds_per_step: float
    evaluation: dict[str, float]
    bad: int = 0
    skipped: int = 0
    memory_bytes: int = 0
    samples: str = "pairs"

    def message(self) -> str:
        """Format the figures for the progress bar."""
        bad = f", {self.bad:,} bad samples" if self.bad else ""
        return (
            f"loss {self.loss:.3f}, {self.samples_per_second:.0f} {self.samples}/s, "
            f"{self.memory_bytes / 1e9:.1f} GB{bad}, {self.data_wait:.0%} waiting for data"
        )

    def evaluation_message(self) -> str:
        """Format the evaluation's scores, one per task."""
        return ", ".join(f"{name} {value:.1%}" for name, value in self.evaluation.items())


class MetricsLog:
    """Appends to metrics.jsonl. On resume, lines after the checkpoint are dropped first.

    Args:
        start: number of completed steps.
    """

    def __init__(self, run: Path, *, start: int) -> None:
        self._path = run / METRICS_FILE
        kept = [line for line in read_metrics(run) if line["step"] <= start]
        self._write_all(kept)

    def is_evaluated(self, step: int) -> bool:
        """Return whether there are scores of a step."""
        return bool(last_evaluation(self._path.parent, step=step))

    def add_evaluation(self, step: int, scores: Mapping[str, float]) -> dict[str, Any]:
        """Add scores to the line of the last logged step if it is `step`, else write a line for them; return them."""
        evaluation = {f"{EVALUATION_PREFIX}{name}": value for name, value in scores.items()}
        lines = read_metrics(self._path.parent)
        logged = lines.pop() if lines and lines[-1]["step"] == step else {"step": step}
        self._write_all([*lines, {**logged, **evaluation}])
        return {"step": step, **evaluation}

    def _write_all(self, lines: list[dict[str, Any]]) -> None:
        write_bytes(self._path, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and flush it to disk."""
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")


def last_evaluation(run: Path, *, step: int) -> dict[str, float]:
    """Return the scores that a run has of a step, its last one so far, by task; empty if that was not evaluated."""
    lines = [line for line in read_metrics(run) if line["step"] == step]
    scores = [item for line in lines for item in line.items() if item[0].startswith(EVALUATION_PREFIX)]
    return {name.removeprefix(EVALUATION_PREFIX): value for name, value in scores}


def metrics_line(
    progress: Progress, terms: Mapping[str, Tensor], embeddings: EmbeddingBatch, extra: Mapping[str, float]
) -> dict[str, Any]:
    """Return a line of metrics.jsonl; a non-finite loss becomes null."""
    return {
        "step": progress.step,
        "loss": progress.loss if math.isfinite(progress.loss) else None,
        **{f"{TERM_PREFIX}{name}": term.item() for name, term in terms.items()},
        **embedding_geometry(embeddings),
        **extra,
        "samples_per_second": round(progress.samples_per_second, 2),
        "data_wait": round(progress.data_wait, 4),
        "seconds_per_step": float(f"{progress.seconds_per_step:.4g}"),
        "memory_mb": round(progress.memory_bytes / 1e6),
        "bad_samples": progress.bad,
        "skipped_steps": progress.skipped,
        **{f"{EVALUATION_PREFIX}{name}": value for name, value in progress.evaluation.items()},
    }


def peak_memory_on(device: torch.device) -> int:
    """Return this process's peak memory in bytes: GPU memory on a GPU, else host memory; 0 if unknown."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes() or 0


@torch.no_grad()
def embedding_geometry(batch: EmbeddingBatch) -> dict[str, float]:
    """Return the mean cosine of positive pairs, of negative pairs, and their gap, for student and teacher.

    Only the pairs count of a batch that has other rows; fewer than two of them have no such values.
    """
    if batch.paired is not None:
        batch = batch.only_pairs()
        if len(batch.student_image) < 2:
            return {}
    models = {"student": (batch.student_image, batch.student_text)}
    if batch.teacher_image is not None and batch.teacher_text is not None:
        models["teacher"] = (batch.teacher_image, batch.teacher_text)
    result = dict[str, float]()
    for name, (image, text) in models.items():
        positive, negative = mean_similarities(image, text)
        result |= {f"{name}_positive": positive, f"{name}_negative": negative, f"{name}_gap": positive - negative}
    return result


def mean_similarities(image: Tensor, text: Tensor) -> tuple[float, float]:
    """Return the mean cosines of the B positive and the B·(B − 1) negative pairs of a batch; NaN without negatives.

    Args:
        image, text: (B, D), L2-normalised.
    """
    pairs = len(image)
    positive = (image.float() * text.float()).sum().item()
    # Σ_ij v_i·t_j = (Σ_i v_i)·(Σ_j t_j): memory grows with B·D rather than with B².
    total = (image.float().sum(dim=0) @ text.float().sum(dim=0)).item()
    return positive / pairs, (total - positive) / (pairs * (pairs - 1)) if pairs > 1 else math.nan
