"""Run a suite: open every model, measure its accuracy, then time all of them in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from clip_rd_edge.benchmarking.answers import Answers, ZeroShotAnswers, marks_of
from clip_rd_edge.benchmarking.cold import ColdStart, Launch, measure_cold_start
from clip_rd_edge.benchmarking.comparison import TaskAnswers, compare
from clip_rd_edge.benchmarking.environment import this_environment
from clip_rd_edge.benchmarking.latency import Latencies, measure_latencies
from clip_rd_edge.benchmarking.load import Throughput, measure_energy, measure_throughput
from clip_rd_edge.benchmarking.opened import Opened
from clip_rd_edge.benchmarking.parts import Parts
from clip_rd_edge.benchmarking.results import MissingTask, Results, RowResult
from clip_rd_edge.benchmarking.rows import Measured, OpenEncoder, Progress, measure_rows
from clip_rd_edge.benchmarking.samples import choose_samples
from clip_rd_edge.benchmarking.suite import Suite, check_suite
from clip_rd_edge.benchmarking.worst import worst_classes
from clip_rd_edge.contract.task import Task, ZeroShotTask
from clip_rd_edge.data.clip_benchmark import Fallback, neutral
from clip_rd_edge.errors import InputError

_DEFAULT_LABELS = 1_000  # to classify among, where the suite has retrieval alone


def _unheard(*_: object) -> None:
    """Progress that nobody watches."""


def run_suite(
    suite: Suite,
    open_encoder: OpenEncoder,
    progress: Progress = _unheard,
    *,
    fallback: Fallback = neutral,
    parts: Parts | None = None,
    launch: Launch | None = None,
) -> Results:
    """Measure every model of a suite; one that cannot be opened or measured is skipped, with its reason.

    Args:
        open_encoder: opens a folder or `hf-hub:ORG/REPO`, on `suite.threads` threads, with `runtime=` where the row
            names one; given from outside, as it may need torch.
        progress: told of progress.
        fallback: templates for data sets that have none; given from outside, too.
        parts: where accuracies are kept as they are measured, and taken from where they were measured already.
        launch: the command of a process that answers once; without one, no cold start is measured.

    Raises:
        ConfigError: the suite does not make sense.
        InputError: a task is unknown or empty, or no model could be measured.
    """
    check_suite(suite, source=f"The suite {suite.name}")
    missing = suite.missing()
    tasks = suite.load_tasks(fallback)
    measured = measure_rows(suite, tasks, open_encoder, progress, parts)
    if not measured.encoders:
        reasons = " ".join(f"{row.label}: {row.reason}" for row in measured.skipped)
        raise InputError(f"None of the models of the suite {suite.name} could be measured. {reasons}")
    picture, labels = tasks[0].images[0], _labels(tasks)
    latencies = measure_latencies(
        measured.encoders,
        picture,
        labels=labels,
        threads=suite.threads,
        rounds=suite.rounds,
        progress=partial(progress, "Latency"),
    )
    progress("Throughput", 0, 1)
    pixels = {label: Opened(encoder, picture, labels).pixels for label, encoder in measured.encoders.items()}
    throughput = measure_throughput(measured.encoders, pixels)
    energy = measure_energy(measured.encoders, pixels)
    progress("Throughput", 1, 1)
    cold = _cold_starts(suite, measured, tasks, launch, progress)
    rows = _rows(suite, tasks, measured, latencies, throughput, energy, cold)
    answers = _answers(measured.answers, tasks)
    return Results(
        suite=suite,
        environment=this_environment(),
        rows=rows,
        reference=latencies.reference,
        other_load=latencies.other_load,
        skipped=tuple(measured.skipped),
        missing=tuple(MissingTask(name=name, reason=reason) for name, reason in missing.items()),
        comparisons=compare(rows, answers),
        samples=choose_samples(rows, *answers[0]) if answers else (),
        worst=worst_classes(rows[-1].label, *answers[0]) if answers else (),
    )


def _cold_starts(
    suite: Suite, measured: Measured, tasks: Sequence[Task], launch: Launch | None, progress: Progress
) -> dict[str, ColdStart | None]:
    rows = [row for row in suite.rows if row.label in measured.models] if launch else []
    found = {}
    for done, row in enumerate(rows):
        progress("Cold start", done, len(rows))
        assert launch is not None
        command = launch(measured.models[row.label], row.runtime, suite.threads)
        found[row.label] = measure_cold_start(command, tasks[0].images[0])
        progress("Cold start", done + 1, len(rows))
    return found


def _rows(
    suite: Suite,
    tasks: Sequence[Task],
    measured: Measured,
    latencies: Latencies,
    throughput: Mapping[str, tuple[Throughput, ...]],
    energy: Mapping[str, float],
    cold: Mapping[str, ColdStart | None],
) -> tuple[RowResult, ...]:
    rows = {row.label: row for row in suite.rows}
    return tuple(
        RowResult(
            label=label,
            role=rows[label].role,
            model=rows[label].model,
            description=encoder.describe(),
            scores=tuple(given.score for given in measured.answers[label]),
            latency=latencies.rows[label],
            throughput=throughput[label],
            cold_start=cold.get(label),
            energy_joules=energy.get(label),
            marks=tuple(
                mark
                for task, given in zip(tasks, measured.answers[label], strict=True)
                for mark in marks_of(task, given)
            ),
        )
        for label, encoder in measured.encoders.items()
    )


def _labels(tasks: Sequence[Task]) -> int:
    """Number of labels of the first task that has any."""
    return next((len(task.labels) for task in tasks if isinstance(task, ZeroShotTask)), _DEFAULT_LABELS)


def _answers(measured: Mapping[str, Sequence[Answers]], tasks: Sequence[Task]) -> list[TaskAnswers]:
    """What every model said on each zero-shot task."""
    found: list[TaskAnswers] = []
    for i, task in enumerate(tasks):
        if isinstance(task, ZeroShotTask):
            row_answers = ((label, row[i]) for label, row in measured.items())
            found.append((task, {label: given for label, given in row_answers if isinstance(given, ZeroShotAnswers)}))
    return found
