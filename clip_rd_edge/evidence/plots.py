"""Learning curves and geometry over training as PNG: a line a method, mean over seeds, in a band from least to most."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from clip_rd_edge.evidence.results import Curve, Evidence, runs_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by most colour-blind readers, too: Okabe and Ito's palette, black for the first.
COLOURS = ("#000000", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
GEOMETRY = {"positive": "own caption", "negative": "others' captions", "gap": "gap"}


def learning_curves(evidence: Evidence) -> bytes:
    """Top-1 of each zero-shot task over training, a column a student."""
    names = list(dict.fromkeys(name for run in evidence.runs for name in run.curves if name.startswith("evaluation/")))
    figure, grid = _grid(evidence, len(names), "Top-1 over training, %")
    for row, name in enumerate(names):
        for column, student in enumerate(evidence.suite.students):
            axes = grid[row][column]
            axes.set_title(f"{student}: {name.removeprefix('evaluation/')}", fontsize=9)
            _lines(axes, evidence, student, [name], factor=100)
        grid[row][0].set_ylim(bottom=0)  # of the whole row, and after all of it: it ends the search for the upper end
    return _png(figure, grid)


def geometry_curves(evidence: Evidence) -> bytes:
    """Mean cosines in the training batches over training, a column a student; the teacher dashed."""
    figure, grid = _grid(evidence, len(GEOMETRY), "Mean cosine of pictures and captions in the training batches")
    for row, (kind, title) in enumerate(GEOMETRY.items()):
        for column, student in enumerate(evidence.suite.students):
            axes = grid[row][column]
            axes.set_title(f"{student}: {title}", fontsize=9)
            _lines(axes, evidence, student, _names("student", kind))
            _teacher(axes, evidence, student, _names("teacher", kind))
    return _png(figure, grid)


def _names(who: str, kind: str) -> list[str]:
    """A curve, or the two whose difference it is."""
    return [f"{who}_positive", f"{who}_negative"] if kind == "gap" else [f"{who}_{kind}"]


def _lines(axes: Axes, evidence: Evidence, student: str, names: Sequence[str], *, factor: float = 1) -> None:
    for number, method in enumerate(evidence.suite.methods):
        runs = runs_of(evidence, student, method.name).values()
        curves = [curve for run in runs if (curve := _minus(run.curves, names))]
        if not curves:
            continue
        colour = COLOURS[number % len(COLOURS)]
        values = factor * np.asarray([curve.values for curve in curves])
        axes.plot(curves[0].steps, values.mean(axis=0), color=colour, linewidth=1.3, label=method.name)
        axes.fill_between(
            curves[0].steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.12, linewidth=0
        )


def _teacher(axes: Axes, evidence: Evidence, student: str, names: Sequence[str]) -> None:
    runs = [run for run in evidence.runs if run.student == student]
    curve = next((curve for run in runs if (curve := _minus(run.curves, names))), None)
    if curve:
        axes.plot(curve.steps, curve.values, color="#57534e", linewidth=1, linestyle="--", label="teacher")


def _minus(curves: dict[str, Curve], names: Sequence[str]) -> Curve | None:
    """The first of the named curves, less the second where there are two; None where one is missing."""
    if any(name not in curves for name in names):
        return None
    first, *rest = (np.asarray(curves[name].values) for name in names)
    values = first - rest[0] if rest else first
    return Curve(steps=curves[names[0]].steps, values=tuple(values.tolist()))


def _grid(evidence: Evidence, rows: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure  # the object interface: no display, no global state

    columns = len(evidence.suite.students)
    figure = Figure(figsize=(3.7 * columns, 2.1 * rows + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid: list[list[Any]] = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey="row").tolist()
    for axes in (axes for row in grid for axes in row):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e7e5e4", linewidth=0.6)
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=8)
    return figure, grid


def _png(figure: Figure, grid: list[list[Axes]]) -> bytes:
    handles: dict[str, Any] = {}
    for axes in (axes for row in grid for axes in row):
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    # A palette: half the bytes, for pictures that lie in the repository.
    Image.open(drawn).convert("RGB").quantize(128).save(small, format="png", optimize=True)
    return small.getvalue()
