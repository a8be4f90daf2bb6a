"""Run a suite: open every model, measure its accuracy, then time all of them in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from clip_rd_edge.benchmarking.accuracy import Advance, ZeroShotAnswers, retrieval, zero_shot
from clip_rd_edge.benchmarking.comparison import TaskAnswers, compare
from clip_rd_edge.benchmarking.environment import this_environment
from clip_rd_edge.benchmarking.latency import measure_latencies
from clip_rd_edge.benchmarking.parts import DamagedPartError, Measured, Parts
from clip_rd_edge.benchmarking.results import MissingTask, Results, RowResult, SkippedRow
from clip_rd_edge.benchmarking.samples import choose_samples
from clip_rd_edge.benchmarking.scores import Score
from clip_rd_edge.benchmarking.suite import Suite, SuiteRow, check_suite
from clip_rd_edge.contract.encoder import TowerEncoder
from clip_rd_edge.contract.task import Task, ZeroShotTask
from clip_rd_edge.data.templates import Fallback, neutral
from clip_rd_edge.errors import ClipRdEdgeError, InputError
from clip_rd_edge.runtime.loading import load

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all
OpenEncoder = Callable[[str], TowerEncoder]


def _unheard(*_: object) -> None:
    """Progress that nobody watches."""


def run_suite(
    suite: Suite,
    open_encoder: OpenEncoder,
    progress: Progress = _unheard,
    *,
    fallback: Fallback = neutral,
    parts: Parts | None = None,
) -> Results:
    """Measure every model of a suite; one that cannot be opened or measured is skipped, with its reason.

    Args:
        open_encoder: opens a folder or `hf-hub:ORG/REPO`, on `suite.threads` threads; given from outside, as it may
            need torch.
        progress: told of progress.
        fallback: templates for data sets that have none; given from outside, too.
        parts: where accuracies are kept as they are measured, and taken from where they were measured already.

    Raises:
        ConfigError: the suite does not make sense.
        InputError: a task is unknown or empty, or no model could be measured.
    """
    check_suite(suite, source=f"The suite {suite.name}")
    missing = suite.missing()
    tasks = suite.load_tasks(fallback)
    encoders: dict[str, TowerEncoder] = {}
    measured: dict[str, list[Measured]] = {}
    skipped: list[SkippedRow] = []
    for row in suite.rows:
        try:
            model = suite.find(row)
            # A runtime can only be chosen for a bundle, and only a bundle is opened without torch.
            encoder = load(model, threads=suite.threads, runtime=row.runtime) if row.runtime else open_encoder(model)
            measured[row.label] = [_measure_once(encoder, task, row, model, parts, progress) for task in tasks]
            encoders[row.label] = encoder
        except ModuleNotFoundError as error:
            # A device without torch still measures its bundles.
            reason = f"It needs the package {error.name!r}, which is not installed."
            skipped.append(SkippedRow(label=row.label, model=row.model, reason=reason))
        except DamagedPartError:
            raise
        except ClipRdEdgeError as error:
            skipped.append(SkippedRow(label=row.label, model=row.model, reason=str(error)))
    if not encoders:
        reasons = " ".join(f"{row.label}: {row.reason}" for row in skipped)
        raise InputError(f"None of the models of the suite {suite.name} could be measured. {reasons}")
    progress("Latency", 0, 1)
    latencies = measure_latencies(encoders, tasks[0].images[0], threads=suite.threads, rounds=suite.rounds)
    progress("Latency", 1, 1)
    rows = tuple(
        RowResult(
            label=row.label,
            role=row.role,
            model=row.model,
            description=encoders[row.label].describe(),
            scores=tuple(_score(given) for given in measured[row.label]),
            latency=latencies[row.label],
        )
        for row in suite.rows
        if row.label in encoders
    )
    answers = _answers(measured, tasks)
    return Results(
        suite=suite,
        environment=this_environment(),
        rows=rows,
        skipped=tuple(skipped),
        missing=tuple(MissingTask(name=name, reason=reason) for name, reason in missing.items()),
        comparisons=compare(rows, answers),
        samples=choose_samples(rows, *answers[0]) if answers else (),
    )


def _measure_once(
    encoder: TowerEncoder, task: Task, row: SuiteRow, model: str, parts: Parts | None, progress: Progress
) -> Measured:
    """A model's measurement on a task: what was kept of it, or else a new one, which is kept."""
    kept = parts.find(model, row.runtime, task) if parts else None
    if kept is not None:
        return kept
    measured = _measure(encoder, task, advance=partial(progress, f"{row.label}: {task.name}"))
    if parts:
        parts.keep(model, row.runtime, task, measured, row=row.label)
    return measured


def _measure(encoder: TowerEncoder, task: Task, *, advance: Advance) -> Measured:
    if isinstance(task, ZeroShotTask):
        return zero_shot(encoder, task, advance=advance)
    return retrieval(encoder, task, advance=advance)


def _score(given: Measured) -> Score:
    return given.score if isinstance(given, ZeroShotAnswers) else given


def _answers(measured: Mapping[str, Sequence[Measured]], tasks: Sequence[Task]) -> list[TaskAnswers]:
    """What every model said on each zero-shot task."""
    found: list[TaskAnswers] = []
    for i, task in enumerate(tasks):
        if isinstance(task, ZeroShotTask):
            row_answers = ((label, row[i]) for label, row in measured.items())
            found.append((task, {label: given for label, given in row_answers if isinstance(given, ZeroShotAnswers)}))
    return found
