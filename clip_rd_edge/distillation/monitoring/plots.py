"""Plots of a run: its loss, geometry and accuracy over training, and of the averages of two models."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.runs import EVALUATION_PREFIX, TERM_PREFIX, read_metrics
from clip_rd_edge.utils.files import write_bytes

STUDENT_COLOUR, TEACHER_COLOUR, NEUTRAL_COLOUR = "#c2410c", "#1d4ed8", "#6b7280"


def plot_run(run: Path, folder: Path, embeddings: dict[str, tuple[Embeddings, Embeddings]] | None = None) -> None:
    """Plot `losses.png`, `geometry.png`, `evaluation.png` and `similarity.png` into `folder`, as far as there is data.

    Args:
        embeddings: for `student` and `teacher`, image and text embeddings of the same pairs, (N, D) each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = read_metrics(run)
    _plot_losses(lines, folder / "losses.png")
    _plot_geometry(lines, folder / "geometry.png")
    _plot_evaluations(lines, folder / "evaluation.png")
    if embeddings:
        _plot_histograms(embeddings, folder / "similarity.png")


def _plot_losses(lines: list[dict[str, Any]], path: Path) -> None:
    names = sorted({key for line in lines for key in line if key.startswith(TERM_PREFIX)})
    if not names:
        return
    with _figure(path, len(names), "Unweighted loss terms over training steps") as axes:
        for axis, name in zip(axes, names, strict=True):
            steps, values = _series(lines, name)
            axis.plot(steps, values, color=STUDENT_COLOUR, linewidth=1.4)
            axis.set_title(name.removeprefix(TERM_PREFIX), fontsize=10)
            if values.size and values.min() > 0 and values.max() / values.min() > 30:
                axis.set_yscale("log")


def _plot_geometry(lines: list[dict[str, Any]], path: Path) -> None:
    titles = {
        "positive": "Matching pairs: mean cosine",
        "negative": "Other pairs: mean cosine",
        "gap": "Gap between the two",
    }
    if not any("student_gap" in line for line in lines):
        return
    with _figure(path, 3, "Separation of matching from other pairs in the training batches") as axes:
        for axis, (kind, title) in zip(axes, titles.items(), strict=True):
            for model, colour in (("student", STUDENT_COLOUR), ("teacher", TEACHER_COLOUR)):
                steps, values = _series(lines, f"{model}_{kind}")
                if steps.size:
                    axis.plot(steps, values, color=colour, linewidth=1.4, label=model)
            axis.set_title(title, fontsize=10)
        axes[0].legend(frameon=False, fontsize=9)


def _plot_evaluations(lines: list[dict[str, Any]], path: Path) -> None:
    names = sorted({key for line in lines for key in line if key.startswith(EVALUATION_PREFIX)})
    if not names:
        return
    with _figure(path, 1, "Accuracy over training") as (axis,):
        for name in names:
            steps, values = _series(lines, name)
            axis.plot(
                steps, 100 * values, marker="o", markersize=3, label=verbatim(name.removeprefix(EVALUATION_PREFIX))
            )
        axis.set_ylabel("%")
        axis.legend(frameon=False, fontsize=9)


def _plot_histograms(embeddings: dict[str, tuple[Embeddings, Embeddings]], path: Path) -> None:
    with _figure(path, len(embeddings), "Cosine of images and captions after training", xlabel="cosine") as axes:
        for axis, (model, (image, text)) in zip(axes, embeddings.items(), strict=True):
            cosine = image @ text.T
            diagonal = np.eye(len(cosine), dtype=bool)
            low, high = float(cosine.min()), float(cosine.max())
            bins = np.linspace(low, max(high, low + 1e-3), 60)  # an untrained model may map everything to one point
            colour = STUDENT_COLOUR if model == "student" else TEACHER_COLOUR
            axis.hist(cosine[diagonal], bins=bins, density=True, color=colour, alpha=0.75, label="matching pairs")
            axis.hist(cosine[~diagonal], bins=bins, density=True, color=NEUTRAL_COLOUR, alpha=0.5, label="other pairs")
            axis.set_title(model, fontsize=10)
            axis.set_yticks([])
            axis.legend(frameon=False, fontsize=9)


class Prediction(NamedTuple):
    """The text that a model finds the most probable for an image, and the right one."""

    image: Image.Image
    right: str
    found: str
    probability: float


def plot_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Plot images with what was found in them, and with what is right where that is wrong."""
    with _figure(path, len(predictions), "Predictions", xlabel="") as axes:
        for axis, (image, right, found, probability) in zip(axes, predictions, strict=True):
            axis.imshow(image)
            axis.set_axis_off()
            lines = [f"{_short(found)} {probability:.0%}", *([] if found == right else [f"({_short(right)})"])]
            axis.set_title("\n".join(lines), fontsize=8, color="black" if found == right else STUDENT_COLOUR)


def _short(text: str) -> str:
    return verbatim(textwrap.shorten(text, 40, placeholder=" …"))


def plot_average(weights: Sequence[float], scores: Mapping[str, Sequence[float]], chosen: float, path: Path) -> None:
    """Plot the accuracy of the averages of two models over the weight of the second.

    Args:
        scores: accuracy at each of the weights, by task.
        chosen: the weight that is marked.
    """
    with _figure(path, 1, "Accuracy between two models", xlabel="weight of the second model") as (axis,):
        for name, values in scores.items():
            axis.plot(weights, [100 * value for value in values], marker="o", markersize=3, label=verbatim(name))
        axis.axvline(chosen, color=NEUTRAL_COLOUR, linewidth=1, linestyle="--")
        axis.set_ylabel("%")
        axis.legend(frameon=False, fontsize=9)


def verbatim(name: str) -> str:
    """Return a name as matplotlib takes it to draw just that: a text with two dollar signs would be a formula."""
    return name.replace("$", r"\$")


def _series(lines: list[dict[str, Any]], key: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


@contextmanager
def _figure(path: Path, count: int, title: str, *, xlabel: str = "step") -> Iterator[list[Any]]:
    """Yield the axes of `count` plots, which are written to `path` as one PNG after the block."""
    from matplotlib.figure import Figure  # the object interface needs no display and no global state

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
    yield axes[:count]
    png = io.BytesIO()
    with warnings.catch_warnings():  # of characters that the font lacks
        warnings.simplefilter("ignore")
        figure.savefig(png, format="png", dpi=120)
    write_bytes(path, png.getvalue())
