"""The evidence as Markdown: scores, differences, geometry, each with its spread over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from clip_rd_edge.benchmarking.formatting import NOTHING, percent, signed_interval, signed_points
from clip_rd_edge.benchmarking.metrics import ZeroShotScore
from clip_rd_edge.benchmarking.report.markdown import write_between_marks
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.evidence.plots import geometry_curves, learning_curves
from clip_rd_edge.evidence.results import (
    FORMAT_VERSION,
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
    return {"text → picture R@1": score.text_to_image.at1}


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
    return _table(lines)


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
    return _table(lines)


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


def _table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first two columns to the left and the rest to the right."""
    rule = ["---", "---", *["---:"] * (len(lines[0]) - 2)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], rule, *lines[1:]])


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
