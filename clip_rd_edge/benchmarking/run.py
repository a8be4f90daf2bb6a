"""Run a suite: open its models, measure each of them, and skip those that cannot be opened or run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from clip_rd_edge.benchmarking.accuracy import (
    Predictions,
    RetrievalPredictions,
    Sample,
    ZeroShotPredictions,
    choose_samples,
    correctness_of,
    note_class_names,
    predict,
    worst_classes,
)
from clip_rd_edge.benchmarking.latency import (
    EncoderCalls,
    Latencies,
    Launch,
    measure_cold_start,
    measure_latencies,
    measure_throughput,
)
from clip_rd_edge.benchmarking.metrics import ClassScore, difference_interval, difference_p_value
from clip_rd_edge.benchmarking.results import (
    Comparison,
    Environment,
    MissingTask,
    Results,
    RowResult,
    SkippedRow,
    this_environment,
)
from clip_rd_edge.benchmarking.suite import Role, Suite, SuiteRow, check_suite
from clip_rd_edge.bundle.encoder import TowerEncoder
from clip_rd_edge.data.remote import RemoteShard, version
from clip_rd_edge.data.tasks import Task, ZeroShotTask
from clip_rd_edge.errors import ClipRdEdgeError, InputError, UsageError
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.paths import is_folder, is_left_by_system
from clip_rd_edge.utils.structs import encode_json, read_json
from clip_rd_edge.utils.text import SILENT, PrefixedReporter, Reporter

OpenEncoder = Callable[..., TowerEncoder]  # takes a model, and `runtime=` if the row names one
FOLDER = "parts"
_DEFAULT_LABELS = 1_000  # number of labels to classify among if the suite only has retrieval tasks
# The roles that each role is compared with, if the suite has them.
_REFERENCES: dict[Role, tuple[Role, ...]] = {
    "teacher": (),
    "baseline": (),
    "student": ("teacher", "baseline"),
    "exported": ("student",),
    "quantised": ("exported", "teacher"),
}
_FILE = re.compile(r"[0-9a-f]{24}\.json|\.[0-9a-f]{24}\.json\.[0-9a-f]{32}\.tmp")  # the latter left by a kill


@dataclass(frozen=True)
class _Model:
    """A row's model that could be opened: its folder or hub name, and its predictions on each task."""

    row: SuiteRow
    spec: str
    encoder: TowerEncoder
    predictions: Sequence[Predictions]


def run_suite(
    suite: Suite,
    open_encoder: OpenEncoder,
    reporter: Reporter = SILENT,
    *,
    cache: PredictionCache | None = None,
    launch: Launch | None = None,
) -> Results:
    """Measure every model of a suite. Models that cannot be opened or measured are skipped, with the reason.

    Args:
        open_encoder: opens a folder or `hf-hub:ORG/REPO` on `suite.threads` threads, with `runtime=` if the row names
            one. Passed in by the caller, because it may need torch.
        cache: where predictions are stored, and read from if they exist.
        launch: command of a process that answers once; None skips the cold start.
    """
    check_suite(suite, source=f"The suite {suite.name}")
    missing, tasks = suite.missing(), suite.load_tasks()
    note_class_names(tasks, reporter)
    models, skipped = _open_and_evaluate(suite, tasks, open_encoder, reporter, cache)
    if not models:
        reasons = " ".join(f"{row.label}: {row}" for row in skipped)
        raise InputError(f"None of the models of the suite {suite.name} could be measured. {reasons}")
    rows, latencies = _measure(suite, models, tasks, reporter, launch)
    zero_shot = _zero_shot(models, tasks)
    samples: tuple[Sample, ...] = ()
    worst: tuple[ClassScore, ...] = ()
    if zero_shot:
        task, found = zero_shot[0]
        shown = dict.fromkeys([*[row.label for row in rows if row.role == "teacher"][:1], rows[-1].label])
        samples = choose_samples(task, {label: found[label] for label in shown})
        worst = worst_classes(task, found[rows[-1].label])
    return Results(
        suite=suite,
        environment=this_environment(),
        rows=tuple(rows),
        reference=latencies.reference,
        other_load=latencies.other_load,
        skipped=tuple(skipped),
        missing=tuple(MissingTask(name=name, reason=reason) for name, reason in missing.items()),
        comparisons=_compare(rows, zero_shot),
        samples=samples,
        weakest=worst,
    )


def _open_and_evaluate(
    suite: Suite, tasks: Sequence[Task], open_encoder: OpenEncoder, reporter: Reporter, cache: PredictionCache | None
) -> tuple[list[_Model], list[SkippedRow]]:
    """Open every model and measure its accuracy; return those that could be, and those that are skipped."""
    models, skipped = list[_Model](), list[SkippedRow]()
    for row in suite.rows:
        with _skipped_if_it_fails(row, skipped):
            spec = suite.resolve_model(row)
            encoder = open_encoder(spec, runtime=row.runtime) if row.runtime else open_encoder(spec)
            # Once, so that a model whose predictions are cached does not first fail while it is timed.
            calls = EncoderCalls(encoder, tasks[0].images[0], 1)
            calls.embed_image()
            calls.embed_text()
            predictions = list[Predictions]()
            for task in tasks:
                found = cache.find(spec, row.runtime, task) if cache else None
                if found is None:
                    prefixed = PrefixedReporter(reporter, f"{row.label}: ")
                    found = predict(encoder, task, matches=True, shots=suite.shots, reporter=prefixed)
                    if cache:
                        cache.store(spec, row.runtime, task, found)
                predictions.append(found)
            models.append(_Model(row, spec, encoder, predictions))
    return models, skipped


def _measure(
    suite: Suite, models: Sequence[_Model], tasks: Sequence[Task], reporter: Reporter, launch: Launch | None
) -> tuple[list[RowResult], Latencies]:
    image, encoders = tasks[0].images[0], {model.row.label: model.encoder for model in models}
    labels = next((len(task.labels) for task in tasks if isinstance(task, ZeroShotTask)), _DEFAULT_LABELS)
    latencies = measure_latencies(
        encoders, image, labels=labels, threads=suite.threads, rounds=suite.rounds, reporter=reporter
    )
    reporter.update("Throughput", 0, 1)
    pixels = {label: EncoderCalls(encoder, image, labels).pixels for label, encoder in encoders.items()}
    throughput = measure_throughput(encoders, pixels)
    reporter.update("Throughput", 1, 1)
    rows = []
    for done, model in enumerate(models):
        cold_start = None
        if launch:
            reporter.update("Cold start", done, len(models))
            cold_start = measure_cold_start(launch(model.spec, model.row.runtime, suite.threads), image)
        label, predictions = model.row.label, model.predictions
        correct = (correctness_of(task, found) for task, found in zip(tasks, predictions, strict=True))
        rows.append(
            RowResult(
                label=label,
                role=model.row.role,
                model=model.row.model,
                description=model.encoder.describe(),
                scores=tuple(found.score for found in predictions),
                latency=latencies.rows[label],
                throughput=throughput[label],
                cold_start=cold_start,
                correctness=tuple(chain.from_iterable(correct)),
            )
        )
    return rows, latencies


@contextmanager
def _skipped_if_it_fails(row: SuiteRow, skipped: list[SkippedRow]) -> Iterator[None]:
    """Add a row whose model cannot be opened or run to those that are skipped."""
    try:
        yield
    except ModuleNotFoundError as error:
        # A device without torch still measures its bundles.
        reason = f"It needs the package {error.name!r}, which is not installed."
        skipped.append(SkippedRow(label=row.label, model=row.model, reason=reason))
    except ClipRdEdgeError as error:
        skipped.append(SkippedRow(label=row.label, model=row.model, reason=str(error), hint=error.hint))


_ZeroShot = tuple[ZeroShotTask, Mapping[str, ZeroShotPredictions]]  # a task, and each model's predictions by label


def _zero_shot(models: Sequence[_Model], tasks: Sequence[Task]) -> list[_ZeroShot]:
    return [
        (task, {m.row.label: found for m in models if isinstance(found := m.predictions[i], ZeroShotPredictions)})
        for i, task in enumerate(tasks)
        if isinstance(task, ZeroShotTask)
    ]


def _compare(rows: Sequence[RowResult], zero_shot: Sequence[_ZeroShot]) -> tuple[Comparison, ...]:
    """Compare every row with the first row of each of its reference roles, on every zero-shot task."""
    first = {row.role: row.label for row in reversed(rows)}
    pairs = [(row.label, first[role]) for row in rows for role in _REFERENCES[row.role] if role in first]
    comparisons = []
    for label, reference in pairs:
        for task, predictions in zero_shot:
            hits, reference_hits = predictions[label].hits(task), predictions[reference].hits(task)
            comparisons.append(
                Comparison(
                    task=task.name,
                    label=label,
                    reference=reference,
                    difference=float(hits.mean() - reference_hits.mean()),
                    interval=difference_interval(hits, reference_hits),
                    p_value=difference_p_value(hits, reference_hits),
                )
            )
    return tuple(comparisons)


def is_cache(folder: Path) -> bool:
    """Return whether a folder is a cache: it exists, and holds nothing but a cache's files."""
    return is_folder(folder) and all(map(_is_ours, folder.iterdir()))


def _is_ours(path: Path) -> bool:
    return bool(_FILE.fullmatch(path.name)) or is_left_by_system(path)


class PredictionCache:
    """A folder of predictions, one file per model and task, so that an interrupted benchmark can resume.

    Each file name is a hash of everything that the predictions depend on. Latencies are compared as ratios, which must
    come from a single run: a resumed benchmark times all models again.

    Args:
        folder: created when the first predictions are stored.
        environment: its hardware, package versions and commit are part of the hash: processors round INT8 differently.
        shots: as in `Suite`.
    """

    def __init__(self, folder: Path, environment: Environment, *, shots: int = 0) -> None:
        self.folder = folder
        hardware = (environment.machine, environment.instruction_sets, environment.accelerator)
        self._environment = repr((hardware, sorted(environment.packages.items()), environment.commit, shots))

    def find(self, model: str, runtime: str | None, task: Task) -> Predictions | None:
        """Return the cached predictions of this model on this task, or None if there are none, or damaged ones."""
        path = self._path(model, runtime, task)
        kind: Any = ZeroShotPredictions if isinstance(task, ZeroShotTask) else RetrievalPredictions
        with suppress(UsageError):
            found: Predictions = read_json(path, kind)
            return found
        return None

    def store(self, model: str, runtime: str | None, task: Task, predictions: Predictions) -> None:
        """Write the predictions of one model on one task atomically."""
        write_bytes(self._path(model, runtime, task), encode_json(predictions))

    def remove(self) -> None:
        """Delete the cache, once its contents are in the results, and nothing else that may be in its folder."""
        with suppress(OSError):  # the folder is not there, or not empty
            for path in self.folder.iterdir():
                if _is_ours(path):
                    path.unlink()
            self.folder.rmdir()

    def _path(self, model: str, runtime: str | None, task: Task) -> Path:
        key = (self._environment, repr(runtime), _model_state(model), task_state(task))
        return self.folder / f"{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:24]}.json"


def _model_state(model: str) -> str:
    """Return a model's name and, for a folder, the sizes and dates of its files: hashing gigabytes takes too long."""
    files = sorted(path for path in Path(model).rglob("*") if path.is_file()) if Path(model).is_dir() else []
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return repr((model, stats))


def task_state(task: Task) -> str:
    """Return a task's questions, and the names, sizes and dates of its images or of the shards that hold them.

    For a remote shard, it is the version that the task was loaded from.
    """
    files = dict.fromkeys(getattr(image, "shard", image) for image in task.images)  # many images share a shard
    states: list[tuple[int, int | str]] = []
    for path in files:
        with suppress(OSError):  # reported when it is opened
            if isinstance(path, Path):
                status = path.stat()
                states.append((status.st_size, status.st_mtime_ns))
            elif isinstance(path, RemoteShard):
                states.append(version(path))
    return repr((task.name, (*map(str, task.images), *states), *task.questions))
