"""What `classify` says of a picture: a line of text, a JSON object, or rows of a CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_rd_edge.runtime.classifier import Prediction

Format = Callable[[str, "Sequence[Prediction]"], str]
CSV_HEADER = "picture,rank,label,probability"
NONE = "none of these"


def as_text(picture: str, answers: Sequence[Prediction]) -> str:
    """Picture, a tab, and the labels with their percentages, likeliest first."""
    shown = "  ".join(f"{label} {probability:.1%}" for label, probability in answers)
    return f"{picture}\t{shown or NONE}"


def as_json(picture: str, answers: Sequence[Prediction]) -> str:
    """One object; `predictions` is empty where the picture shows none of the labels."""
    predictions = [{"label": label, "probability": round(probability, 6)} for label, probability in answers]
    return json.dumps({"picture": picture, "predictions": predictions}, ensure_ascii=False)


def as_csv(picture: str, answers: Sequence[Prediction]) -> str:
    """A row a label; one with an empty label where the picture shows none of them."""
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    for rank, (label, probability) in enumerate(answers, start=1):
        rows.writerow((picture, rank, label, f"{probability:.6f}"))
    if not answers:
        rows.writerow((picture, 1, "", ""))
    return buffer.getvalue().rstrip("\n")
