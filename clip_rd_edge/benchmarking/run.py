"""Run a suite: open its models, measure each of them, and skip those that cannot be opened or run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from clip_rd_edge.benchmarking.accuracy import Answers, ZeroShotAnswers, answer, correctness_of, say_class_names
from clip_rd_edge.benchmarking.answer_cache import AnswerCache, DamagedCacheError
from clip_rd_edge.benchmarking.latency import EncoderCalls, Latencies, measure_latencies
from clip_rd_edge.benchmarking.metrics import difference_interval, difference_p_value
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
from clip_rd_edge.bundle.encoder import TowerEncoder
from clip_rd_edge.bundle.labels import in_words
from clip_rd_edge.bundle.manifest import is_bundle, read_manifest
from clip_rd_edge.data.tasks import TEMPLATES, RetrievalTask, Task, ZeroShotTask
from clip_rd_edge.errors import ClipRdEdgeError, InputError, UsageError
from clip_rd_edge.utils.reporting import SILENT, PrefixedReporter, Reporter

OpenEncoder = Callable[..., TowerEncoder]  # takes a model, and `runtime=` if the row names one


@dataclass
class OpenModels:
    """The models of a suite that could be opened, by label and in the suite's order, and those that were skipped.

    Attributes:
        models: folder or hub name of each model.
        answers: each model's answers, one entry per task.
    """

    encoders: dict[str, TowerEncoder] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    answers: dict[str, list[Answers]] = field(default_factory=dict)
    skipped: list[SkippedRow] = field(default_factory=list)


def open_and_evaluate(
    suite: Suite, tasks: Sequence[Task], open_encoder: OpenEncoder, reporter: Reporter, cache: AnswerCache | None
) -> OpenModels:
    """Open every model and measure its accuracy."""
    opened = OpenModels()
    for row in suite.rows:
        with _skipped_if_it_fails(row, opened):
            _require_answers(suite.resolve_model(row), tasks)
    for skipped in opened.skipped:  # before the others are measured, which may take long
        reporter.say(f"{skipped.label} is skipped: {skipped}")
    refused = {row.label for row in opened.skipped}
    for row in suite.rows:
        if row.label in refused:
            continue
        with _skipped_if_it_fails(row, opened):
            model = suite.resolve_model(row)
            encoder = open_encoder(model, runtime=row.runtime) if row.runtime else open_encoder(model)
            _try_once(encoder, tasks[0])
            answers = [_cached_or_new_answers(encoder, task, row, model, cache, reporter) for task in tasks]
            opened.encoders[row.label], opened.models[row.label] = encoder, model
            opened.answers[row.label] = answers
    return opened


@contextmanager
def _skipped_if_it_fails(row: SuiteRow, opened: OpenModels) -> Iterator[None]:
    """Add a row whose model cannot be opened or run to those that are skipped."""
    try:
        yield
    except ModuleNotFoundError as error:
        # A device without torch still measures its bundles.
        reason = f"It needs the package {error.name!r}, which is not installed."
        opened.skipped.append(SkippedRow(label=row.label, model=row.model, reason=reason))
    except DamagedCacheError:
        raise
    except ClipRdEdgeError as error:
        opened.skipped.append(SkippedRow(label=row.label, model=row.model, reason=str(error), hint=error.hint))


def _require_answers(model: str, tasks: Sequence[Task]) -> None:
    """Refuse a bundle whose manifest says that it cannot answer a task: it has no text tower. No tower is loaded."""
    if not is_bundle(Path(model)):
        return
    manifest = read_manifest(Path(model))
    if manifest.text is not None:
        return
    for task in tasks:
        if isinstance(task, RetrievalTask):
            manifest.require_text()
        elif task.templates != manifest.templates:
            own = manifest.templates
            lines = repr(own[0]) if len(own) == 1 else "those of its manifest.json, one per line,"
            file = f"write {lines} into {TEMPLATES} in the folder of {task.name}, or " if task.templates_from else ""
            raise UsageError(
                f"The bundle of {manifest.name} has no text tower: its labels were embedded with {in_words(own)}, and "
                f"{task.name} asks for {in_words(task.templates)}.",
                hint=f"{file}export the model again, with its text tower",
            )


def _try_once(encoder: TowerEncoder, task: Task) -> None:
    """Run both towers once, so that a model whose accuracy is cached does not first fail while it is timed."""
    calls = EncoderCalls(encoder, task.images[0], 1)
    calls.embed_image()
    calls.embed_text()


def _cached_or_new_answers(
    encoder: TowerEncoder, task: Task, row: SuiteRow, model: str, cache: AnswerCache | None, reporter: Reporter
) -> Answers:
    """Return a model's answers on a task from the cache, or measure and cache them."""
    cached = cache.find(model, row.runtime, task) if cache else None
    if cached is not None:
        return cached
    answers = answer(encoder, task, reporter=PrefixedReporter(reporter, f"{row.label}: "))
    if cache:
        cache.store(model, row.runtime, task, answers, row=row.label)
    return answers


TaskAnswers = tuple[ZeroShotTask, Mapping[str, ZeroShotAnswers]]  # a task, and each model's predictions by label

# The roles that each role is compared with, if the suite has them.
_REFERENCES: dict[Role, tuple[Role, ...]] = {
    "teacher": (),
    "baseline": (),
    "student": ("teacher", "baseline"),
    "exported": ("student",),
    "quantised": ("exported", "teacher"),
}


def compare(rows: Sequence[RowResult], answers: Sequence[TaskAnswers]) -> tuple[Comparison, ...]:
    """Compare every row with the first row of each of its reference roles, on every zero-shot task."""
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
        p_value=difference_p_value(hits, reference_hits),
    )


_DEFAULT_LABELS = 1_000  # number of labels to classify among if the suite only has retrieval tasks


def run_suite(
    suite: Suite,
    open_encoder: OpenEncoder,
    reporter: Reporter = SILENT,
    *,
    cache: AnswerCache | None = None,
    launch: Launch | None = None,
) -> Results:
    """Measure every model of a suite. Models that cannot be opened or measured are skipped, with the reason.

    Args:
        open_encoder: opens a folder or `hf-hub:ORG/REPO` on `suite.threads` threads, with `runtime=` if the row names
            one. Passed in by the caller, because it may need torch.
        cache: where accuracy results are stored, and read from if they exist.
        launch: command of a process that answers once; None skips the cold start.
    """
    check_suite(suite, source=f"The suite {suite.name}")
    missing = suite.missing()
    tasks = suite.load_tasks()
    say_class_names(tasks, reporter)
    opened = open_and_evaluate(suite, tasks, open_encoder, reporter, cache)
    if not opened.encoders:
        reasons = " ".join(f"{row.label}: {row}" for row in opened.skipped)
        raise InputError(f"None of the models of the suite {suite.name} could be measured. {reasons}")
    image, labels = tasks[0].images[0], _label_count(tasks)
    latencies = measure_latencies(
        opened.encoders,
        image,
        labels=labels,
        threads=suite.threads,
        rounds=suite.rounds,
        reporter=reporter,
    )
    reporter.update("Throughput", 0, 1)
    pixels = {label: EncoderCalls(encoder, image, labels).pixels for label, encoder in opened.encoders.items()}
    throughput = measure_throughput(opened.encoders, pixels)
    energy = measure_energy(opened.encoders, pixels)
    reporter.update("Throughput", 1, 1)
    cold_starts = _cold_starts(suite, opened, tasks, launch, reporter)
    rows = _rows(suite, tasks, opened, latencies, throughput, energy, cold_starts)
    answers = _zero_shot_answers(opened.answers, tasks)
    return Results(
        suite=suite,
        environment=this_environment(),
        rows=rows,
        reference=latencies.reference,
        other_load=latencies.other_load,
        skipped=tuple(opened.skipped),
        missing=tuple(MissingTask(name=name, reason=reason) for name, reason in missing.items()),
        comparisons=compare(rows, answers),
        samples=choose_samples(rows, *answers[0]) if answers else (),
        worst=worst_classes(rows[-1].label, *answers[0]) if answers else (),
    )


def _cold_starts(
    suite: Suite, opened: OpenModels, tasks: Sequence[Task], launch: Launch | None, reporter: Reporter
) -> dict[str, ColdStart | None]:
    rows = [row for row in suite.rows if row.label in opened.models] if launch else []
    cold_starts = {}
    for done, row in enumerate(rows):
        reporter.update("Cold start", done, len(rows))
        assert launch is not None
        command = launch(opened.models[row.label], row.runtime, suite.threads)
        cold_starts[row.label] = measure_cold_start(command, tasks[0].images[0])
        reporter.update("Cold start", done + 1, len(rows))
    return cold_starts


def _rows(
    suite: Suite,
    tasks: Sequence[Task],
    opened: OpenModels,
    latencies: Latencies,
    throughput: Mapping[str, tuple[Throughput, ...]],
    energy: Mapping[str, float],
    cold_starts: Mapping[str, ColdStart | None],
) -> tuple[RowResult, ...]:
    rows = {row.label: row for row in suite.rows}
    return tuple(
        RowResult(
            label=label,
            role=rows[label].role,
            model=rows[label].model,
            description=encoder.describe(),
            scores=tuple(answers.score for answers in opened.answers[label]),
            latency=latencies.rows[label],
            throughput=throughput[label],
            cold_start=cold_starts.get(label),
            energy_joules=energy.get(label),
            correctness=tuple(
                correctness
                for task, answers in zip(tasks, opened.answers[label], strict=True)
                for correctness in correctness_of(task, answers)
            ),
        )
        for label, encoder in opened.encoders.items()
    )


def _label_count(tasks: Sequence[Task]) -> int:
    """Return the number of labels of the first zero-shot task."""
    return next((len(task.labels) for task in tasks if isinstance(task, ZeroShotTask)), _DEFAULT_LABELS)


def _zero_shot_answers(answers: Mapping[str, Sequence[Answers]], tasks: Sequence[Task]) -> list[TaskAnswers]:
    """Return each zero-shot task with the predictions of all models."""
    task_answers: list[TaskAnswers] = []
    for i, task in enumerate(tasks):
        if isinstance(task, ZeroShotTask):
            by_label = {label: row[i] for label, row in answers.items()}
            predictions = {label: row for label, row in by_label.items() if isinstance(row, ZeroShotAnswers)}
            task_answers.append((task, predictions))
    return task_answers
