"""Pictures of a run, as PNG: the terms, accuracy over training, and the geometry figures of the CLIP-RD paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.distill.metrics import EVALUATION, read_metrics

STUDENT, TEACHER, MUTED = "#c2410c", "#1d4ed8", "#6b7280"


def plot_run(run: Path, folder: Path, similarities: dict[str, tuple[Embeddings, Embeddings]] | None = None) -> None:
    """Draw `losses.png`, `geometry.png`, `evaluation.png` (where there were any) and `similarity.png` into `folder`.

    Args:
        similarities: for `student` and `teacher`, image and text embeddings of the same pairs, (N, D) each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = read_metrics(run)
    _plot_losses(lines, folder / "losses.png")
    _plot_geometry(lines, folder / "geometry.png")
    _plot_evaluations(lines, folder / "evaluation.png")
    if similarities:
        _plot_histograms(similarities, folder / "similarity.png")


def _plot_losses(lines: list[dict[str, Any]], path: Path) -> None:
    names = sorted({key for line in lines for key in line if key.startswith("loss/")})
    if not names:
        return
    figure, axes = _figure(len(names), "Loss terms at weight 1, over training steps")
    for axis, name in zip(axes, names, strict=False):
        steps, values = _series(lines, name)
        axis.plot(steps, values, color=STUDENT, linewidth=1.4)
        axis.set_title(name.removeprefix("loss/"), fontsize=10)
        if values.size and values.min() > 0 and values.max() / values.min() > 30:
            axis.set_yscale("log")
    figure.savefig(path, dpi=120)


def _plot_geometry(lines: list[dict[str, Any]], path: Path) -> None:
    kinds = {
        "positive": "Matching pairs: mean cosine",
        "negative": "Other pairs: mean cosine",
        "gap": "Gap between the two",
    }
    if not any("student_gap" in line for line in lines):
        return
    figure, axes = _figure(3, "How far matching pairs stand apart from others, in the training batches")
    for axis, (kind, title) in zip(axes, kinds.items(), strict=False):
        for who, colour in (("student", STUDENT), ("teacher", TEACHER)):
            steps, values = _series(lines, f"{who}_{kind}")
            if steps.size:
                axis.plot(steps, values, color=colour, linewidth=1.4, label=who)
        axis.set_title(title, fontsize=10)
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def _plot_evaluations(lines: list[dict[str, Any]], path: Path) -> None:
    names = sorted({key for line in lines for key in line if key.startswith(EVALUATION)})
    if not names:
        return
    figure, axes = _figure(1, "Accuracy over training")
    for name in names:
        steps, values = _series(lines, name)
        axes[0].plot(steps, 100 * values, marker="o", markersize=3, label=name.removeprefix(EVALUATION))
    axes[0].set_ylabel("%")
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def _plot_histograms(similarities: dict[str, tuple[Embeddings, Embeddings]], path: Path) -> None:
    figure, axes = _figure(len(similarities), "Cosine of pictures and captions after training", xlabel="cosine")
    for axis, (who, (image, text)) in zip(axes, similarities.items(), strict=False):
        cosine = image @ text.T
        diagonal = np.eye(len(cosine), dtype=bool)
        low, high = float(cosine.min()), float(cosine.max())
        bins = np.linspace(low, max(high, low + 1e-3), 60)  # an untrained model may say the same of everything
        colour = STUDENT if who == "student" else TEACHER
        axis.hist(cosine[diagonal], bins=bins, density=True, color=colour, alpha=0.75, label="matching pairs")
        axis.hist(cosine[~diagonal], bins=bins, density=True, color=MUTED, alpha=0.5, label="other pairs")
        axis.set_title(who, fontsize=10)
        axis.set_yticks([])
        axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def _series(lines: list[dict[str, Any]], key: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _figure(count: int, title: str, *, xlabel: str = "step") -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # the object interface: no display, no global state

    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.6 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_xlabel(xlabel, fontsize=8)
    return figure, axes
