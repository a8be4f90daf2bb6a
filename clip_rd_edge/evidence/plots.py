"""Figures of evidence: the curves of all methods over training, one column per student."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from clip_rd_edge.bundle.runs import EVALUATION_PREFIX
from clip_rd_edge.distillation.metrics import verbatim
from clip_rd_edge.evidence.results import Curve, Evidence, runs_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which most colour-blind readers can distinguish; the first colour is black.
COLOURS = ("#000000", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
GEOMETRY = {"positive": "own caption", "negative": "others' captions", "gap": "gap"}


def learning_curves(evidence: Evidence, *, measure: str) -> bytes:
    """Plot the scores of each task over training, which are of `measure`, one column per student."""
    curves = dict.fromkeys(name for run in evidence.runs for name in run.curves)
    names = [name for name in curves if name.startswith(EVALUATION_PREFIX)]
    figure, grid = _grid(evidence, len(names), f"{measure[0].upper()}{measure[1:]} over training, %")
    for row, name in enumerate(names):
        for column, student in enumerate(evidence.suite.students):
            axes = grid[row][column]
            axes.set_title(verbatim(f"{student}: {name.removeprefix(EVALUATION_PREFIX)}"), fontsize=9)
            _plot_methods(axes, evidence, student, [name], factor=100)
        # Applies to the whole row. It stops autoscaling of the upper limit, so it must come after the last curve.
        grid[row][0].set_ylim(bottom=0)
    return _png(figure, grid)


def geometry_curves(evidence: Evidence) -> bytes:
    """Plot mean cosines in the training batches over training, one column per student; the teacher is dashed."""
    figure, grid = _grid(evidence, len(GEOMETRY), "Mean cosine of images and captions in the training batches")
    for row, (kind, title) in enumerate(GEOMETRY.items()):
        for column, student in enumerate(evidence.suite.students):
            axes = grid[row][column]
            axes.set_title(verbatim(f"{student}: {title}"), fontsize=9)
            _plot_methods(axes, evidence, student, _curve_names("student", kind))
            _plot_teacher(axes, evidence, student, _curve_names("teacher", kind))
    return _png(figure, grid)


def _curve_names(model: str, kind: str) -> list[str]:
    """Return the name of a curve, or of the two curves that it is the difference of."""
    return [f"{model}_positive", f"{model}_negative"] if kind == "gap" else [f"{model}_{kind}"]


def _plot_methods(axes: Axes, evidence: Evidence, student: str, names: Sequence[str], *, factor: float = 1) -> None:
    for number, method in enumerate(evidence.suite.methods):
        runs = runs_of(evidence, student, method.name).values()
        curves = [curve for run in runs if (curve := _combine(run.curves, names))]
        if not curves:
            continue
        colour = COLOURS[number % len(COLOURS)]
        steps, values = _at_common_steps(curves)
        values *= factor
        axes.plot(steps, values.mean(axis=0), color=colour, linewidth=1.3, label=verbatim(method.name))
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.12, linewidth=0)


def _plot_teacher(axes: Axes, evidence: Evidence, student: str, names: Sequence[str]) -> None:
    runs = [run for run in evidence.runs if run.student == student]
    curve = next((curve for run in runs if (curve := _combine(run.curves, names))), None)
    if curve:
        axes.plot(curve.steps, curve.values, color="#57534e", linewidth=1, linestyle="--", label="teacher")


def _combine(curves: dict[str, Curve], names: Sequence[str]) -> Curve | None:
    """Return the named curve, or the first minus the second if two are named; None if one is missing."""
    if any(name not in curves for name in names):
        return None
    steps, (first, *rest) = _at_common_steps([curves[name] for name in names])
    values = first - rest[0] if rest else first
    return Curve(steps=steps, values=tuple(values.tolist()))


def _at_common_steps(curves: Sequence[Curve]) -> tuple[tuple[int, ...], np.ndarray[tuple[int, int], Any]]:
    """Return the steps at which all C curves have a point, and their values there, (C, S).

    A step whose value was not finite has none, and a resumed run may have further ones.
    """
    points = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    steps = tuple(step for step in curves[0].steps if all(step in values for values in points))
    return steps, np.asarray([[values[step] for step in steps] for values in points], dtype=np.float64)


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
    full, compact = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=110)
    # A colour palette halves the file size; the figures are committed to the repository.
    Image.open(full, formats=("PNG",)).convert("RGB").quantize(128).save(compact, format="png", optimize=True)
    return compact.getvalue()
