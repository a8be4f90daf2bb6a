"""A suite's models opened, and what each said on every task; one that cannot be opened or run is left out, with why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from clip_rd_edge.benchmarking.accuracy import Answers, ZeroShotAnswers, marks_of, retrieval, zero_shot
from clip_rd_edge.benchmarking.answer_cache import DamagedPartError, Parts
from clip_rd_edge.benchmarking.latency import Latencies, Opened, measure_latencies
from clip_rd_edge.benchmarking.metrics import difference_interval
from clip_rd_edge.benchmarking.results import Comparison, MissingTask, Results, RowResult, SkippedRow, this_environment
from clip_rd_edge.benchmarking.samples import choose_samples, worst_classes
from clip_rd_edge.benchmarking.suite import Role, Suite, SuiteRow, check_suite
from clip_rd_edge.benchmarking.throughput import (
    ColdStart,
    Launch,
    Throughput,
    measure_cold_start,
    measure_energy,
    measure_throughput,
)
from clip_rd_edge.contract.encoder import TowerEncoder
from clip_rd_edge.contract.task import Task, ZeroShotTask
from clip_rd_edge.data.clip_benchmark import Fallback, neutral
from clip_rd_edge.errors import ClipRdEdgeError, InputError
from clip_rd_edge.utils.reporting import SILENT, PrefixedReporter, Reporter

OpenEncoder = Callable[..., TowerEncoder]  # called with a model, and with `runtime=` where a row names one


@dataclass
class Measured:
    """By label, in the suite's order: encoders, their models as they were found, and their answers a task."""

    encoders: dict[str, TowerEncoder] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    answers: dict[str, list[Answers]] = field(default_factory=dict)
    skipped: list[SkippedRow] = field(default_factory=list)


def measure_rows(
    suite: Suite, tasks: Sequence[Task], open_encoder: OpenEncoder, reporter: Reporter, parts: Parts | None
) -> Measured:
    """Open every model and measure its accuracy.

    Raises:
        DamagedPartError: what was kept of an earlier run cannot be read.
    """
    measured = Measured()
    for row in suite.rows:
        try:
            model = suite.find(row)
            encoder = open_encoder(model, runtime=row.runtime) if row.runtime else open_encoder(model)
            _try_once(encoder, tasks[0])
            answers = [_answers_of(encoder, task, row, model, parts, reporter) for task in tasks]
        except ModuleNotFoundError as error:
            # A device without torch still measures its bundles.
            reason = f"It needs the package {error.name!r}, which is not installed."
            measured.skipped.append(SkippedRow(label=row.label, model=row.model, reason=reason))
        except DamagedPartError:
            raise
        except ClipRdEdgeError as error:
            measured.skipped.append(SkippedRow(label=row.label, model=row.model, reason=str(error)))
        else:
            measured.encoders[row.label], measured.models[row.label] = encoder, model
            measured.answers[row.label] = answers
    return measured


def _try_once(encoder: TowerEncoder, task: Task) -> None:
    """Run both towers on one input: what fails when it is timed, after accuracies that were kept, fails here."""
    opened = Opened(encoder, task.images[0], 1)
    opened.embed_image()
    opened.embed_text()


def _answers_of(
    encoder: TowerEncoder, task: Task, row: SuiteRow, model: str, parts: Parts | None, reporter: Reporter
) -> Answers:
    """A model's answers on a task: those that were kept, or else new ones, which are kept."""
    kept = parts.find(model, row.runtime, task) if parts else None
    if kept is not None:
        return kept
    measured = _measure(encoder, task, PrefixedReporter(reporter, f"{row.label}: "))
    if parts:
        parts.keep(model, row.runtime, task, measured, row=row.label)
    return measured


def _measure(encoder: TowerEncoder, task: Task, reporter: Reporter) -> Answers:
    if isinstance(task, ZeroShotTask):
        return zero_shot(encoder, task, reporter=reporter)
    return retrieval(encoder, task, reporter=reporter)


TaskAnswers = tuple[ZeroShotTask, Mapping[str, ZeroShotAnswers]]  # a task, and what each model said, by its label

# What each role is compared with, where the suite has it.
_REFERENCES: dict[Role, tuple[Role, ...]] = {
    "teacher": (),
    "baseline": (),
    "student": ("teacher", "baseline"),
    "exported": ("student",),
    "quantised": ("exported", "teacher"),
}


def compare(rows: Sequence[RowResult], answers: Sequence[TaskAnswers]) -> tuple[Comparison, ...]:
    """Every row with the first row of each role that its own is compared with, on every zero-shot task."""
    first = {row.role: row for row in reversed(rows)}
    pairs = [(row, first[role]) for row in rows for role in _REFERENCES[row.role] if role in first]
    return tuple(_compare(row, reference, *task) for row, reference in pairs for task in answers)


def _compare(
    row: RowResult, reference: RowResult, task: ZeroShotTask, answers: Mapping[str, ZeroShotAnswers]
) -> Comparison:
    hits, reference_hits = answers[row.label].hits(task), answers[reference.label].hits(task)
    return Comparison(
        task=task.name,
        label=row.label,
        reference=reference.label,
        difference=float(hits.mean() - reference_hits.mean()),
        interval=difference_interval(hits, reference_hits),
    )


_DEFAULT_LABELS = 1_000  # to classify among, where the suite has retrieval alone


def run_suite(
    suite: Suite,
    open_encoder: OpenEncoder,
    reporter: Reporter = SILENT,
    *,
    fallback: Fallback = neutral,
    parts: Parts | None = None,
    launch: Launch | None = None,
) -> Results:
    """Measure every model of a suite; one that cannot be opened or measured is skipped, with its reason.

    Args:
        open_encoder: opens a folder or `hf-hub:ORG/REPO`, on `suite.threads` threads, with `runtime=` where the row
            names one; given from outside, as it may need torch.
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
    measured = measure_rows(suite, tasks, open_encoder, reporter, parts)
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
        reporter=reporter,
    )
    reporter.update("Throughput", 0, 1)
    pixels = {label: Opened(encoder, picture, labels).pixels for label, encoder in measured.encoders.items()}
    throughput = measure_throughput(measured.encoders, pixels)
    energy = measure_energy(measured.encoders, pixels)
    reporter.update("Throughput", 1, 1)
    cold = _cold_starts(suite, measured, tasks, launch, reporter)
    rows = _rows(suite, tasks, measured, latencies, throughput, energy, cold)
    answers = _zero_shot_answers(measured.answers, tasks)
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
    suite: Suite, measured: Measured, tasks: Sequence[Task], launch: Launch | None, reporter: Reporter
) -> dict[str, ColdStart | None]:
    rows = [row for row in suite.rows if row.label in measured.models] if launch else []
    found = {}
    for done, row in enumerate(rows):
        reporter.update("Cold start", done, len(rows))
        assert launch is not None
        command = launch(measured.models[row.label], row.runtime, suite.threads)
        found[row.label] = measure_cold_start(command, tasks[0].images[0])
        reporter.update("Cold start", done + 1, len(rows))
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


def _zero_shot_answers(measured: Mapping[str, Sequence[Answers]], tasks: Sequence[Task]) -> list[TaskAnswers]:
    """What every model said on each zero-shot task."""
    found: list[TaskAnswers] = []
    for i, task in enumerate(tasks):
        if isinstance(task, ZeroShotTask):
            row_answers = ((label, row[i]) for label, row in measured.items())
            found.append((task, {label: given for label, given in row_answers if isinstance(given, ZeroShotAnswers)}))
    return found
