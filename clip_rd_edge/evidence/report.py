"""Evidence reports: tables of scores, differences and geometry over seeds in Markdown, beside the figures."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from PIL import Image

from clip_rd_edge.benchmarking.metrics import ZeroShotScore, primary_metric
from clip_rd_edge.benchmarking.report import require_own_files, write_between_markers
from clip_rd_edge.benchmarking.tables import (
    NO_VALUE,
    inert_markdown,
    markdown_table,
    percent,
    signed_interval,
    signed_points,
)
from clip_rd_edge.bundle.runs import EVALUATION_PREFIX as _EVALUATION
from clip_rd_edge.distillation.metrics import verbatim
from clip_rd_edge.errors import without_checkout
from clip_rd_edge.evidence.suite import (
    FORMAT_VERSION,
    TUNED_TEACHER,
    Curve,
    Difference,
    Evidence,
    EvidenceSuite,
    ModelResult,
    RunResult,
    Spread,
    TaskResult,
    difference,
    runs_of,
    spread,
)
from clip_rd_edge.utils.files import write_bytes, write_text
from clip_rd_edge.utils.structs import read_versioned_json
from clip_rd_edge.utils.text import each_text, shown_source, shown_sources

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TOP1, _IMAGE_TO_TEXT = "top-1", "image → text R@1"
_MIN_SEEDS = 3  # of a difference in bold: two seeds have the same sign by chance every second time
_DIFFERENCES_NOTE = (
    "Differences in {}, in percentage points, paired by seed; in parentheses the 95 % confidence interval, by "
    "bootstrap over images, each resampled together with all its seeds: it covers other images, not other "
    "trainings. Bold: the interval excludes zero, and the difference has the same sign for all of three or more seeds."
)
_GEOMETRY_NOTE = (
    "Geometry on the pairs of the retrieval tasks: mean cosine similarity of an image with its own caption, with the "
    "captions of other images, and the gap between the two."
)


def markdown(evidence: Evidence) -> str:
    """Return all tables, after the settings and the cost."""
    prose = [_settings(evidence), _tasks(evidence), *training_data_remark(evidence.suite)]
    parts = [*map(inert_markdown, prose), _score_table(evidence)]
    if _differ_in_steps(evidence):
        parts += [_time_table(evidence)]
    if evidence.suite.compare_with:
        parts += [_DIFFERENCES_NOTE.format(_compared(evidence)[1])]
        parts += [_difference_table(evidence, reference) for reference in evidence.suite.compare_with]
    if tasks := [task for task in evidence.teacher.tasks if task.geometry]:  # of retrieval
        headings = [f"{_task_name(evidence, task)}: {name}" for task in tasks for name in ("own", "others", "gap")]
        table = _means_table(evidence, headings, _cosines, show=lambda value: f"{value:.3f}".replace("-", "−"))
        parts += [_GEOMETRY_NOTE, table]
    return "\n\n".join(parts)


def training_data_remark(suite: EvidenceSuite) -> list[str]:
    """Return a warning if a task has the pairs that the students are trained on; else, an empty list."""
    return [
        f"{shown_source(task)} is both trained and evaluated on: its scores say nothing about new pairs."
        for task in suite.tasks
        if Path(task) == Path(suite.data)
    ]


def _settings(evidence: Evidence) -> str:
    suite, runs = evidence.suite, evidence.runs
    planned = len(list(suite.runs()))
    done = f"All {planned} runs are finished" if len(runs) == planned else f"{len(runs)} of {planned} runs are finished"
    dates = sorted({run.environment.date[:10] for run in runs})
    threads = f"{suite.threads} thread{'s' if suite.threads > 1 else ''}"
    counts = {machine: len(on_it) for machine, on_it in _by_machine(runs).items()}
    shown = (f"{name} ({n} run{'s' if n > 1 else ''})" if len(counts) > 1 else name for name, n in counts.items())
    steps = f"{suite.steps:,} steps" + (", or those given below," if _differ_in_steps(evidence) else "")
    return (
        f"{done}: {steps} of {suite.batch_size} pairs at {suite.image_size} pixels each, "
        f"{suite.precision}, peak learning rate {suite.learning_rate:g}. {' and '.join(shown)}, {threads}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}. {_cost(evidence)} "
        "Scores in percent, mean ± standard deviation over seeds."
    )


def _tasks(evidence: Evidence) -> str:
    """Return how many images each task has, and what chance would reach."""
    shown = list[str]()
    for task in evidence.teacher.tasks:
        score = task.score
        count, what = (score.classes, "labels") if isinstance(score, ZeroShotScore) else (score.captions, "captions")
        name = _task_name(evidence, task)
        shown.append(f"{name}, {score.images:,} images among {count:,} {what} (chance {percent(1 / count)} %)")
    return f"Tasks: {'; '.join(shown)}."


def _by_machine(runs: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Return the runs by the machine that they ran on: seconds of two machines cannot be averaged.

    Machines of one name whose processors have different instruction sets are distinguished by these.
    """
    known = {(run.environment.machine, run.environment.instruction_sets) for run in runs}
    counts = Counter(machine for machine, sets in known if sets)
    machines: dict[str, list[RunResult]] = {}
    for run in runs:
        machine, sets = run.environment.machine, run.environment.instruction_sets
        name = f"{machine} with {', '.join(sets)}" if sets and counts[machine] > 1 else machine
        machines.setdefault(name, []).append(run)
    return machines


def _cost(evidence: Evidence) -> str:
    by_machine = _by_machine(evidence.runs)
    costs = []
    for machine, runs in by_machine.items():
        seconds = [run.cpu_seconds for run in runs if run.cpu_seconds is not None]
        if not seconds:
            continue
        counted = "" if len(seconds) == len(runs) else f", over the {len(seconds)} runs without interruption"
        range_minutes = " to ".join(dict.fromkeys(f"{value / 60:.1f}" for value in (min(seconds), max(seconds))))
        where = f" on {machine}" if len(by_machine) > 1 else ""
        costs.append(f"{sum(seconds) / 3600:.1f} hours of CPU time{where}, {range_minutes} minutes per run{counted}")
    is_tuned = evidence.suite.data == "emoji" and evidence.teacher.model == TUNED_TEACHER
    teacher = "tuning the teacher and computing its embeddings" if is_tuned else "computing the teacher's embeddings"
    return f"Cost: {'; '.join(costs)}, plus {teacher}." if costs else ""


def _differ_in_steps(evidence: Evidence) -> bool:
    return any(method.steps for method in evidence.suite.methods)


def _time_table(evidence: Evidence) -> str:
    methods = {method.name: method for method in evidence.suite.methods}
    by_machine = _by_machine(evidence.runs)
    several = len(by_machine) > 1
    lines = [["student", "method", *(["machine"] if several else []), "steps", "CPU time of training, s"]]
    for student, method, _ in _rows(evidence):
        for machine, on_it in by_machine.items():
            own = [run for run in on_it if (run.student, run.method) == (student, method)]
            if not own:
                continue
            seconds = [run.cpu_seconds for run in own if run.cpu_seconds is not None]
            shown = _show_spread(spread(seconds), "{:.0f}".format) if seconds else ""
            steps = f"{evidence.suite.steps_of(methods[method], student):,}"
            lines.append([student, f"`{method}`", *([machine] if several else []), steps, shown])
    return markdown_table(lines, left=(0, 1, 2) if several else (0, 1))


def _score_table(evidence: Evidence) -> str:
    tasks = evidence.teacher.tasks
    headings = [f"{_task_name(evidence, task)}, {name}" for task in tasks for name in _figures(task, tasks)]
    if not (len(_zero_shot(evidence)) > 1 and _mean_top1(evidence, evidence.teacher)):
        return _means_table(evidence, headings, _values, show=percent)

    def with_share(result: ModelResult) -> list[float]:
        return [*_values(result), _mean_top1(evidence, result) / _mean_top1(evidence, evidence.teacher)]

    return _means_table(evidence, [*headings, "mean top-1, % of the teacher's"], with_share, show=percent)


def _zero_shot(evidence: Evidence) -> list[int]:
    return [i for i, task in enumerate(evidence.teacher.tasks) if isinstance(task.score, ZeroShotScore)]


def _compared(evidence: Evidence) -> tuple[list[int], str]:
    """Return the indices of the tasks that methods are compared on, and in what: zero-shot tasks, if there are any."""
    if zero_shot := _zero_shot(evidence):
        return zero_shot, _TOP1
    return list(range(len(evidence.teacher.tasks))), _IMAGE_TO_TEXT


def _mean_top1(evidence: Evidence, result: ModelResult) -> float:
    return float(np.mean([primary_metric(result.tasks[i].score) for i in _zero_shot(evidence)]))


def _figures(task: TaskResult, tasks: Sequence[TaskResult]) -> dict[str, float]:
    """Return the figures that a table shows of one of the tasks, by name; one with few labels has no top-5.

    Image-to-text retrieval is left out where it equals top-1: with the labels of a built-in task, one for each image.
    """
    score = task.score
    figures: dict[str, float | None]
    if isinstance(score, ZeroShotScore):
        figures = {_TOP1: score.top1, "top-5": score.top5}
    else:
        figures = {_IMAGE_TO_TEXT: score.image_to_text.at1, "text → image R@1": score.text_to_image.at1}
        own = [other.score for other in tasks if f"{other.score.task}, retrieval" == score.task]
        if any(isinstance(other, ZeroShotScore) and score.captions == other.images == other.classes for other in own):
            del figures[_IMAGE_TO_TEXT]
    return {name: value for name, value in figures.items() if value is not None}


def _values(result: ModelResult) -> list[float]:
    """Return the figures of all tasks in order, the same for every model of a suite."""
    return [value for task in result.tasks for value in _figures(task, result.tasks).values()]


def _difference_table(evidence: Evidence, reference: str) -> str:
    compared, _ = _compared(evidence)
    columns = {_task_name(evidence, evidence.teacher.tasks[i]): [i] for i in compared}
    if len(columns) > 1:
        columns["mean of the tasks"] = compared
    lines = [["student", f"method − `{reference}`", "seeds", *columns]]
    for student, method, runs in _rows(evidence):
        if method == reference:
            continue
        reference_runs = runs_of(evidence, student, reference)
        own = {run.seed: run for run in runs}
        differences = [difference(own, reference_runs, tasks) for tasks in columns.values()]
        seeds = next((entry.spread.count for entry in differences if entry), 0)
        lines.append([student, f"`{method}`", str(seeds), *map(_show_difference, differences)])
    return markdown_table(lines, left=(0, 1))


def _cosines(result: ModelResult) -> list[float]:
    geometries = [task.geometry for task in result.tasks if task.geometry]
    return [value for geometry in geometries for value in (geometry.positive, geometry.negative, geometry.gap)]


def _means_table(
    evidence: Evidence,
    headings: Sequence[str],
    figures: Callable[[ModelResult], list[float]],
    *,
    show: Callable[[float], str],
) -> str:
    """Return a table of the teacher's figures, and of mean ± deviation over seeds per student and method."""
    lines = [["student", "method", "seeds", *headings]]
    lines.append(["", "teacher", "", *map(show, figures(evidence.teacher))])
    for student, method, runs in _rows(evidence):
        spreads = map(spread, zip(*(figures(run.result) for run in runs), strict=True))
        cells = [_show_spread(cell, show) for cell in spreads]
        lines.append([student, f"`{method}`", str(len(runs)), *cells])
    return markdown_table(lines, left=(0, 1))


def _show_spread(values: Spread, show: Callable[[float], str]) -> str:
    return show(values.mean) + ("" if values.deviation is None else f" ± {show(values.deviation)}")


def _rows(evidence: Evidence) -> list[tuple[str, str, list[RunResult]]]:
    """Return each student and method that has finished runs, with these runs."""
    combinations = [(student, method.name) for student in evidence.suite.students for method in evidence.suite.methods]
    rows = [(student, method, [*runs_of(evidence, student, method).values()]) for student, method in combinations]
    return [row for row in rows if row[2]]


def _task_name(evidence: Evidence, task: TaskResult) -> str:
    return task.score.task.removeprefix(f"{evidence.suite.data}, ")


def _show_difference(entry: Difference | None) -> str:
    if entry is None:
        return NO_VALUE
    text = signed_points(entry.spread.mean)
    text += "" if entry.spread.deviation is None else f" ± {percent(entry.spread.deviation)}"
    text += f" ({signed_interval(entry.interval)})"
    is_clear = entry.same_sign and entry.spread.count >= _MIN_SEEDS
    return f"**{text}**" if is_clear and (entry.interval.low > 0 or entry.interval.high < 0) else text


def write_evidence(path: Path, evidence: Evidence) -> None:
    """Write the results as JSON with one line per run: indented, the curves would take thousands of lines.

    They are published, so the package's folder, and what may be a secret in the addresses of data, are left out.
    """
    plain = each_text(shown_sources(msgspec.to_builtins(evidence)), without_checkout())
    runs = ",\n".join(msgspec.json.encode(run).decode() for run in plain.pop("runs"))
    head = msgspec.json.encode(plain).decode().removesuffix("}")
    write_text(path, f'{head},\n"runs":[\n{runs}\n]}}\n')


def read_evidence_file(path: Path) -> Evidence:
    hint = "expected the results of an evidence suite; those of a benchmark are for clip-rd-edge benchmark --compare"
    return read_versioned_json(path, Evidence, newest=FORMAT_VERSION, hint=hint)


_PAGE, _CURVES, _GEOMETRY = ".md", "-curves.png", "-geometry.png"  # after the suite's name, beside NAME.json


def require_report_folder(folder: Path, name: str) -> None:
    """Refuse a folder where a file of the user's has the name of the results of the suite `name`, or of its report."""
    made = [folder / f"{name}{ending}" for ending in (_PAGE, _CURVES, _GEOMETRY)]
    require_own_files(folder / f"{name}.json", lambda beginning: beginning.startswith(b'{"suite":'), made)


def write_report(evidence: Evidence, folder: Path) -> list[Path]:
    """Write tables and figures to `folder`, and return their paths."""
    page = folder / f"{evidence.suite.name}{_PAGE}"
    return _write(evidence, folder, lambda: write_text(page, markdown(evidence) + "\n"), [page])


def publish(source: Path, page: Path) -> None:
    """Write the tables of the JSON file `source` between the markers in `page`, and the figures beside `source`."""
    evidence = read_evidence_file(source)
    _write(evidence, source.parent, lambda: write_between_markers(page, evidence.suite.name, markdown(evidence)), [])


def _write(evidence: Evidence, folder: Path, write_page: Callable[[], object], pages: list[Path]) -> list[Path]:
    """Write figures into a folder, after the page, which stays as it is if they cannot be drawn; return all paths."""
    name = evidence.suite.name
    figures = {
        folder / f"{name}{_CURVES}": learning_curves(evidence, measure=_compared(evidence)[1]),
        folder / f"{name}{_GEOMETRY}": geometry_curves(evidence),
    }
    write_page()
    for path, png in figures.items():
        write_bytes(path, png)
    return [*pages, *figures]


# Okabe and Ito's palette, which most colour-blind readers can distinguish; the first colour is black.
_COLOURS = ("#000000", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")


def learning_curves(evidence: Evidence, *, measure: str) -> bytes:
    """Plot the scores of each task over training, which are of `measure`, one column per student."""
    curves = dict.fromkeys(name for run in evidence.runs for name in run.curves)
    panels = [_Panel(name.removeprefix(_EVALUATION), [name]) for name in curves if name.startswith(_EVALUATION)]
    return _draw(evidence, f"{measure[0].upper()}{measure[1:]} over training, %", panels, factor=100)


def geometry_curves(evidence: Evidence) -> bytes:
    """Plot mean cosines in the training batches over training, one column per student; the teacher is dashed."""
    panels = [
        _Panel(title, [f"student_{kind}" for kind in kinds], [f"teacher_{kind}" for kind in kinds])
        for title, kinds in (
            ("own caption", ["positive"]),
            ("others' captions", ["negative"]),
            ("gap", ["positive", "negative"]),
        )
    ]
    return _draw(evidence, "Mean cosine of images and captions in the training batches", panels)


class _Panel(NamedTuple):
    """A row of plots: the name of a curve, or of the two that it is the difference of; and those of the teacher."""

    title: str
    names: Sequence[str]
    of_teacher: Sequence[str] = ()


def _draw(evidence: Evidence, title: str, panels: Sequence[_Panel], *, factor: float = 1) -> bytes:
    from matplotlib.figure import Figure  # the object interface: no display, no global state

    students = evidence.suite.students
    figure = Figure(figsize=(3.7 * len(students), 2.1 * len(panels) + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid: list[list[Axes]] = figure.subplots(
        len(panels), len(students), squeeze=False, sharex=True, sharey="row"
    ).tolist()
    for row, panel in zip(grid, panels, strict=True):
        for axes, student in zip(row, students, strict=True):
            axes.set_title(verbatim(f"{student}: {panel.title}"), fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
            axes.grid(color="#e7e5e4", linewidth=0.6)
            _plot(axes, evidence, student, panel, factor)
        if factor != 1:  # after the last curve, as it stops autoscaling of the upper limit of the whole row
            row[0].set_ylim(bottom=0)
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=8)
    handles: dict[str, Any] = {}
    for axes in (axes for row in grid for axes in row):
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    full, compact = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=110)
    # A colour palette halves the file size; the figures are committed to the repository.
    Image.open(full, formats=("PNG",)).convert("RGB").quantize(128).save(compact, format="png", optimize=True)
    return compact.getvalue()


def _plot(axes: Axes, evidence: Evidence, student: str, panel: _Panel, factor: float) -> None:
    for number, method in enumerate(evidence.suite.methods):
        runs = runs_of(evidence, student, method.name).values()
        curves = [curve for run in runs if (curve := _combine(run.curves, panel.names))]
        if curves:
            colour = _COLOURS[number % len(_COLOURS)]
            steps, values = _at_common_steps(curves)
            values *= factor
            axes.plot(steps, values.mean(axis=0), color=colour, linewidth=1.3, label=verbatim(method.name))
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.12, linewidth=0)
    runs_of_student = [run for run in evidence.runs if run.student == student]
    if panel.of_teacher and (found := [c for run in runs_of_student if (c := _combine(run.curves, panel.of_teacher))]):
        steps, values = found[0].steps, np.asarray(found[0].values)
        axes.plot(steps, values, color="#57534e", linewidth=1, linestyle="--", label="teacher")


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
