"""What a run writes down: one line a log step in metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from clip_rd_edge.contract.files import write_bytes
from clip_rd_edge.losses.objective import EmbeddingBatch

FILE = "metrics.jsonl"


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
