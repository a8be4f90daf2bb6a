"""The evidence as Markdown: scores, differences, geometry, each with its spread over seeds."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from PIL import Image

from clip_rd_edge.benchmarking.formatting import NOTHING, markdown_table, percent, signed_interval, signed_points
from clip_rd_edge.benchmarking.metrics import ZeroShotScore
from clip_rd_edge.benchmarking.report.text import write_between_marks
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.evidence.results import (
    FORMAT_VERSION,
    Curve,
    Difference,
    Evidence,
    ModelResult,
    RunResult,
    TaskResult,
    difference,
    runs_of,
    spread,
)
from clip_rd_edge.utils.io import read_versioned_json, write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NOTE = (
    "Differences of top-1 in points, paired by seed; in brackets the 95 % interval by bootstrap over pictures, each "
    "drawn with all its seeds. Bold: zero lies outside of it, and all seeds agree on the sign."
)
_GEOMETRY = (
    "Geometry on pairs that were not trained on: mean cosine of a picture with its own caption, with the others', and "
    "the gap between the two."
)


def markdown(evidence: Evidence) -> str:
    """All tables, with the settings and the cost above them."""
    parts = [_settings(evidence), _scores(evidence), _NOTE]
    parts += [_differences(evidence, reference) for reference in evidence.suite.compare_with]
    return "\n\n".join([*parts, _GEOMETRY, _geometry(evidence)])


def _settings(evidence: Evidence) -> str:
    suite, runs = evidence.suite, evidence.runs
    planned = len(list(suite.runs()))
    done = f"All {planned} runs are done" if len(runs) == planned else f"{len(runs)} of {planned} runs are done"
    dates = sorted({run.environment.date[:10] for run in runs})
    threads = f"{suite.threads} thread{'s' if suite.threads > 1 else ''}"
    return (
        f"{done}: {suite.steps:,} steps of {suite.batch_size} pairs at {suite.image_size} pixels each, "
        f"{suite.precision}, peak learning rate {suite.learning_rate:g}. {runs[0].environment.machine}, {threads}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}. {_cost(evidence)} "
        "Scores in percent, mean ± standard deviation over seeds."
    )


def _cost(evidence: Evidence) -> str:
    seconds = [run.cpu_seconds for run in evidence.runs if run.cpu_seconds is not None]
    if not seconds:
        return ""
    counted = "" if len(seconds) == len(evidence.runs) else f", of {len(seconds)} runs that nothing interrupted"
    return (
        f"Cost: {sum(seconds) / 3600:.1f} hours of processor time, {min(seconds) / 60:.1f} to {max(seconds) / 60:.1f} "
        f"minutes a run{counted}; the teacher's tuning and its embeddings come on top."
    )


def _scores(evidence: Evidence) -> str:
    heads = [f"{_task(evidence, task)}, {what}" for task in evidence.teacher.tasks for what in _figures(task)]
    return _means(evidence, heads, _values, show=percent)


def _figures(task: TaskResult) -> dict[str, float | None]:
    """What a table shows of a task. Picture to text is left out of retrieval: among single names, it is top-1."""
    score = task.score
    if isinstance(score, ZeroShotScore):
        return {"top-1": score.top1, "top-5": score.top5}
    return {"text → image R@1": score.text_to_image.at1}


def _values(result: ModelResult) -> list[float]:
    """The figures of all tasks; the same ones for every model of a suite."""
    return [value for task in result.tasks for value in _figures(task).values() if value is not None]


def _differences(evidence: Evidence, reference: str) -> str:
    places = [i for i, task in enumerate(evidence.teacher.tasks) if isinstance(task.score, ZeroShotScore)]
    names = [_task(evidence, evidence.teacher.tasks[i]) for i in places]
    lines = [["student", f"method − `{reference}`", "seeds", *names]]
    for student, method, runs in _rows(evidence):
        if method == reference:
            continue
        others = runs_of(evidence, student, reference)
        found = [difference({run.seed: run for run in runs}, others, place) for place in places]
        seeds = next((of.spread.count for of in found if of), 0)
        lines.append([student, f"`{method}`", str(seeds), *map(_signed, found)])
    return markdown_table(lines, left=(0, 1))


def _geometry(evidence: Evidence) -> str:
    shown = [task for task in evidence.teacher.tasks if task.geometry]
    heads = [f"{_task(evidence, task)}: {what}" for task in shown for what in ("own", "others", "gap")]
    return _means(evidence, heads, _cosines, show=_three)


def _cosines(result: ModelResult) -> list[float]:
    known = [task.geometry for task in result.tasks if task.geometry]
    return [value for of in known for value in (of.positive, of.negative, of.gap)]


def _means(
    evidence: Evidence,
    heads: Sequence[str],
    figures: Callable[[ModelResult], list[float]],
    *,
    show: Callable[[float], str],
) -> str:
    """The teacher's figures, and of each student and method their means and deviations over seeds."""
    lines = [["student", "method", "seeds", *heads]]
    lines.append(["", "teacher", "", *map(show, figures(evidence.teacher))])
    for student, method, runs in _rows(evidence):
        spreads = map(spread, zip(*(figures(run.result) for run in runs), strict=True))
        cells = [show(of.mean) + ("" if of.deviation is None else f" ± {show(of.deviation)}") for of in spreads]
        lines.append([student, f"`{method}`", str(len(runs)), *cells])
    return markdown_table(lines, left=(0, 1))


def _rows(evidence: Evidence) -> list[tuple[str, str, list[RunResult]]]:
    """Student, method and its finished runs, where there are any."""
    every = [(student, method.name) for student in evidence.suite.students for method in evidence.suite.methods]
    found = [(student, method, [*runs_of(evidence, student, method).values()]) for student, method in every]
    return [row for row in found if row[2]]


def _task(evidence: Evidence, task: TaskResult) -> str:
    return task.score.task.removeprefix(f"{evidence.suite.data}, ")


def _three(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _signed(of: Difference | None) -> str:
    if of is None:
        return NOTHING
    text = signed_points(of.spread.mean)
    text += "" if of.spread.deviation is None else f" ± {percent(of.spread.deviation)}"
    if of.interval is None:
        return text
    text += f" ({signed_interval(of.interval)})"
    return f"**{text}**" if of.agreed and (of.interval.low > 0 or of.interval.high < 0) else text


def write_evidence(path: Path, evidence: Evidence) -> None:
    """Write the JSON, a run a line: indented, its curves would be thousands of lines."""
    plain = msgspec.to_builtins(evidence)
    runs = ",\n".join(msgspec.json.encode(run).decode() for run in plain.pop("runs"))
    head = msgspec.json.encode(plain).decode().removesuffix("}")
    write_text(path, f'{head},\n"runs":[\n{runs}\n]}}\n')


def read_evidence_file(path: Path) -> Evidence:
    """Read what `write_evidence` wrote.

    Raises:
        InputError: there is no such file.
        ConfigError: it is damaged, of a newer format, or has no runs.
    """
    evidence = read_versioned_json(path, Evidence, newest=FORMAT_VERSION)
    if not evidence.runs:
        raise ConfigError(f"{path} has no runs; expected one or more.", hint="run the suite again")
    return evidence


def write_report(evidence: Evidence, folder: Path) -> list[Path]:
    """Tables and figures into `folder`; returns what was written."""
    name = evidence.suite.name
    paths = [folder / f"{name}.md", folder / f"{name}-curves.png", folder / f"{name}-geometry.png"]
    write_text(paths[0], markdown(evidence) + "\n")
    write_bytes(paths[1], learning_curves(evidence))
    write_bytes(paths[2], geometry_curves(evidence))
    return paths


def publish(source: Path, page: Path) -> list[Path]:
    """Draw the figures beside the JSON `source` anew, and put its tables between the suite's marks in `page`.

    Raises:
        InputError, ConfigError: `source` or `page` does not fit.
    """
    evidence = read_evidence_file(source)
    name = evidence.suite.name
    figures = {source.with_name(f"{name}-curves.png"): learning_curves(evidence)}
    figures[source.with_name(f"{name}-geometry.png")] = geometry_curves(evidence)
    write_between_marks(page, name, markdown(evidence))
    for path, png in figures.items():
        write_bytes(path, png)
    return [page, *figures]


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
