"""The training loop."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from clip_rd_edge.bundle.encoder import Encoder
from clip_rd_edge.bundle.runs import DISTILLATION_FILE, REPORT_FOLDER
from clip_rd_edge.data.samples import BadSamples, Samples
from clip_rd_edge.distillation.bank import make_bank
from clip_rd_edge.distillation.checkpoint import (
    BEST_FOLDER,
    Stateful,
    load_checkpoint,
    save_checkpoint,
    seed_everything,
)
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.inputs import RunSetup, provenance
from clip_rd_edge.distillation.loader import Batch, StepSampler, ViewDataset, step_loader
from clip_rd_edge.distillation.metrics import (
    EncoderOfAllProcesses,
    MetricsLog,
    Progress,
    metrics_line,
    peak_memory_on,
    plot_run,
)
from clip_rd_edge.distillation.optimizer import RunOptimizer, diverged_error, named_divergence
from clip_rd_edge.distillation.processes import Processes, Stopped, StopRequest, stop_on_signals
from clip_rd_edge.distillation.quantized import Quantization
from clip_rd_edge.distillation.step import AUTOCAST, StepResult, TrainingStep, step_settings
from clip_rd_edge.distillation.student import set_training_mode
from clip_rd_edge.distillation.teacher import BatchTeacher
from clip_rd_edge.distillation.trackers import Tracker, open_tracker
from clip_rd_edge.errors import InterruptedRunError, UsageError, in_one_line
from clip_rd_edge.models.clip import ClipModel, to_device
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.utils.host import FREED_MEMORY_KEPT
from clip_rd_edge.utils.reporting import SILENT, Reporter

if TYPE_CHECKING:
    from clip_rd_edge.distillation.metrics import Predictions


def total_steps(config: RunConfig, pairs: Samples) -> int:
    """Return the number of steps of a run: the recipe's `steps`, or its epochs times the full batches per epoch."""
    return config.recipe.steps or config.recipe.epochs * (len(pairs) // config.recipe.batch_size)


@dataclass(frozen=True)
class Trained:
    """What a run trains, as its newest checkpoint left it.

    Attributes:
        compute: computes gradients from a batch; `optimizer` applies them.
        parts: what a checkpoint holds, by its key there; `bad` are the samples among them that could not be read.
        student, encoder: what is saved and evaluated: the moving average if there is one, else the trained model.
        start, steps: completed steps, and steps in total.
        quantization: the rounding that it is trained under, if any.
    """

    compute: TrainingStep
    optimizer: RunOptimizer
    parts: dict[str, Stateful]
    bad: BadSamples
    student: ClipModel
    encoder: TorchEncoder
    start: int
    steps: int
    quantization: Quantization | None


def prepare(
    config: RunConfig,
    run: Path,
    setup: RunSetup,
    *,
    teacher: BatchTeacher | None,
    dataset: ViewDataset,
    processes: Processes,
    reporter: Reporter,
    bank_source: str | None = None,
) -> Trained:
    """Move student and objective to the device, and restore their state, and all else that training changes.

    Args:
        config: resolved; its precision is not `auto`.
        teacher: None if the objective does not need one.
        bank_source: names the teachers whose embeddings a bank holds.
    """
    recipe, steps, student = config.recipe, total_steps(config, setup.pairs), setup.student
    seed_everything(config.seed)
    model = to_device(student.model, processes.device)
    objective = setup.objective.to(processes.device)
    set_training_mode(student, config)
    optimizer = RunOptimizer(model, objective, recipe, steps=steps)
    parts: dict[str, Stateful] = {"model": model, "objective": objective, "update": optimizer, "bad": dataset.bad}
    quantization = Quantization() if config.quantize else None
    if quantization:
        parts["ranges"] = quantization.ranges
    bank = make_bank(config, len(setup.pairs), dataset.store, setup.ensemble, processes.device, source=bank_source)
    if bank:
        parts["bank"] = bank
    start = load_checkpoint(run, parts, processes, reporter=reporter)
    if start > steps:
        raise UsageError(
            f"{run} has done {start:,} steps, and {config.recipe.epochs:,} epochs of {len(setup.pairs):,} pairs have "
            f"{steps:,}.",
            hint="restore the data that it began with, or start a new run with another {output}",
        )
    if start:
        reporter.note(f"resumed after step {start:,} of {steps:,}")
    saved_student = dataclasses.replace(student, model=optimizer.model_to_save)
    if quantization and start == 0:
        quantization.calibrate(student, dataset, config)
    compute = TrainingStep(
        student,
        teacher,
        objective,
        processes,
        step_settings(config, AUTOCAST[recipe.precision], processes.device),
        image_tower=quantization.tower(student) if quantization else None,
        bank=bank,
    )
    encoder = encoder_of(saved_student, quantization)
    return Trained(compute, optimizer, parts, dataset.bad, saved_student, encoder, start, steps, quantization)


def encoder_of(student: ClipModel, quantization: Quantization | None) -> TorchEncoder:
    """Return what evaluates a student of a run, under the rounding that the run trains for."""
    return TorchEncoder(student, image_tower=quantization.tower(student) if quantization else None)


def train(
    config: RunConfig,
    run: Path,
    setup: RunSetup,
    trained: Trained,
    *,
    dataset: ViewDataset,
    processes: Processes,
    reporter: Reporter = SILENT,
    evaluate: Callable[[Encoder], dict[str, float]] | None = None,
) -> None:
    """Train the student from where `prepare` left it.

    Args:
        config: resolved; its precision is not `auto`.
        evaluate: called with the student every `config.evaluate_every` steps and at the end, in all processes with an
            encoder that they share. Its scores are added to the metrics, and the best student is saved as `RUN/best`.
    """
    start, steps = trained.start, trained.steps
    log = MetricsLog(run, start=start) if processes.is_main else None
    tracker = open_tracker(config, run, start=start, reporter=reporter) if processes.is_main else Tracker()
    sampler = StepSampler(
        setup.pairs.groups,
        config.recipe.batch_size,
        seed=config.seed,
        start=start,
        stop=steps,
        rank=processes.rank,
        processes=processes.world_size,
        prefetch=setup.pairs.prefetch,
    )
    with stop_on_signals() as request, request.deferred(), tracker, FREED_MEMORY_KEPT:
        loop = _Loop(
            config=config,
            run=run,
            setup=setup,
            trained=trained,
            processes=processes,
            request=request,
            log=log,
            tracker=tracker,
            reporter=reporter,
            evaluate=evaluate,
            saved=start,
        )
        for name in changed_tasks(run, setup.task_fingerprints):
            reporter.note(f"the task {name} has other images or labels: the next evaluation replaces the best student")
        loop.repeat_evaluation()
        clock = _Clock()
        batches = step_loader(dataset, sampler, workers=config.workers)
        for step in range(start, steps):
            with clock.waiting():
                batch = loop.next_batch(batches, step)
            result = loop.update(batch, step)
            done = step + 1
            unshared, stop_requests = processes.sum(dataset.bad.unshared, int(bool(request)))
            if unshared:
                dataset.bad.share(processes.gather_objects)
            is_stopping = stop_requests > 0
            loop.save(done, is_stopping=is_stopping)  # before an evaluation, which may fail, as for a damaged image
            with clock.evaluating():
                scores = loop.scores(done)
            loop.report(done, result, scores, clock)
            with clock.evaluating():
                loop.draw(done)
            if not is_stopping and loop.is_evaluation_due(done) and processes.any(bool(request)):
                is_stopping = True
                if done > loop.saved:
                    loop.save(done, is_stopping=True)
            if is_stopping:
                raise loop.interrupted()
        if request:  # during the evaluation of a run whose last step was done before
            raise interrupted(request, run, steps, steps)


class _Clock:
    """Counts seconds from when it is made, and how many of them go into waiting for batches and into evaluating."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.waited = self.evaluated = 0.0

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._started

    @contextmanager
    def waiting(self) -> Iterator[None]:
        since = self.elapsed
        yield
        self.waited += self.elapsed - since

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        since = self.elapsed
        yield
        self.evaluated += self.elapsed - since


@dataclass(kw_only=True)
class _Loop:
    """The parts of an iteration, and what they share.

    Attributes:
        saved: the last step whose state was saved.
        is_save_due: whether a newer state was to be saved, but was not sound.
    """

    config: RunConfig
    run: Path
    setup: RunSetup
    trained: Trained
    processes: Processes
    request: StopRequest
    log: MetricsLog | None
    tracker: Tracker
    reporter: Reporter
    evaluate: Callable[[Encoder], dict[str, float]] | None
    saved: int
    is_save_due: bool = False

    def repeat_evaluation(self) -> None:
        """Evaluate after the last step of before, if that was due and a signal ended it."""
        start, log = self.trained.start, self.log
        is_evaluated = log is None or log.is_evaluated(start)
        if start and self.processes.any(not is_evaluated) and (scores := self.scores(start)) and log:
            self.tracker.add(log.add_evaluation(start, scores))

    def next_batch(self, batches: Iterator[Batch], step: int) -> Batch:
        """Return the batch of a step; a signal that arrives meanwhile stops a single process, its state saved."""
        try:
            with self._stopped_at_once():
                return next(batches)
        except Stopped:
            if step > self.saved and self.trained.optimizer.is_finite:
                save_checkpoint(self.run, step, self.trained.parts)
                self.saved = step
            raise self.interrupted() from None

    def update(self, batch: Batch, step: int) -> StepResult:
        """Update the weights with the gradients of a batch."""
        optimizer = self.trained.optimizer
        result = self.trained.compute(batch, step, loss_scale=optimizer.loss_scale)
        optimizer.apply(step, result.loss.total.item(), run=self.run)
        return result

    def save(self, done: int, *, is_stopping: bool) -> None:
        """Save the state after `done` steps if it is due.

        A skipped step changes no weight, but may be the first of a run that diverges: unless this is the last chance to
        save, the older checkpoint is the better one.
        """
        optimizer, processes = self.trained.optimizer, self.processes
        self.is_save_due = self.is_save_due or done % self.config.checkpoint_every == 0
        if not (self.is_save_due or is_stopping or done == self.trained.steps):
            return
        is_fit = optimizer.is_finite if is_stopping else optimizer.is_sound
        if processes.sum(int(not is_fit)) == [0]:
            if processes.is_main:
                save_checkpoint(self.run, done, self.trained.parts)
            self.saved, self.is_save_due = done, False
        elif processes.sum(int(not optimizer.is_finite)) != [0]:
            raise diverged_error(self.run, f"weights are not finite after step {done:,}")
        processes.barrier()

    def is_evaluation_due(self, done: int) -> bool:
        every = self.config.evaluate_every
        return done == self.trained.steps or (every > 0 and done % every == 0)

    def scores(self, done: int) -> dict[str, float]:
        """Evaluate after `done` steps; empty if that is not due, or if a signal ends it: the resumed run repeats it."""
        if not (self.evaluate and self.is_evaluation_due(done)):
            return {}
        student, processes = self.trained.student, self.processes
        processes.broadcast(student.model.buffers())  # those that are saved
        try:
            with self._stopped_at_once(), named_divergence(self.run):
                scores = self.evaluate(EncoderOfAllProcesses(self.trained.encoder, processes, self.request))
        except Stopped:
            return {}
        if processes.is_main:
            record = partial(provenance, self.config, self.setup, steps=done)
            try:
                save_if_best(self.run, student, scores, provenance=record, tasks=self.setup.task_fingerprints)
            except UsageError as error:  # such as a folder that is open in another window, on Windows
                self.reporter.note(f"the best student is not saved: {error}")
        return scores

    def report(self, done: int, result: StepResult, scores: dict[str, float], clock: _Clock) -> None:
        """Show how far the run is, and log it if that is due."""
        config, optimizer = self.config, self.trained.optimizer
        start, steps = self.trained.start, self.trained.steps
        elapsed = clock.elapsed
        progress = Progress(
            step=done,
            steps=steps,
            loss=result.loss.total.item(),
            samples_per_second=(done - start) * config.recipe.batch_size / (elapsed - clock.evaluated),
            data_wait=clock.waited / (elapsed - clock.evaluated),
            seconds_per_step=elapsed / (done - start),
            evaluation=scores,
            bad=len(self.trained.bad),
            skipped=optimizer.skipped,
            memory_bytes=peak_memory_on(self.processes.device),
            samples="samples" if self.setup.pairs.counts.is_mixed else "pairs",
        )
        if self.log and (done == steps or scores or done % config.log_every == 0):
            extra = {
                "learning_rate": optimizer.learning_rate,
                "gradient_norm": optimizer.gradient_norm,
                "logit_scale": self.setup.student.logit_scale,
            }
            line = metrics_line(progress, result.loss.terms, result.embeddings, extra)
            self.log.write(line)
            self.tracker.write(line)
        self.reporter.update("training", done, steps, progress.message())
        if scores:
            self.reporter.note(f"step {done:,}: {progress.evaluation_message()}")

    @cached_property
    def predictions(self) -> Predictions:
        """Predictions about images of the run's first task, for a tracker that shows them."""
        from clip_rd_edge.distillation.metrics import Predictions

        return Predictions(next(iter(self.setup.tasks), None), self.setup.pairs, self.trained.encoder)

    def draw(self, done: int) -> None:
        """After an evaluation, plot the run so far, and show the tracker what the student predicts."""
        if not (self.processes.is_main and self.is_evaluation_due(done)):
            return
        try:
            self.tracker.show(done, lambda path: self.predictions.plot(path))
            if done < self.trained.steps:  # else it is plotted once the student is saved
                plot_run(self.run, self.run / REPORT_FOLDER)
        except Exception as error:  # noqa: BLE001 - a run must not end by its plots
            self.reporter.note(f"the plots of step {done:,} could not be drawn: {in_one_line(error)}")

    def interrupted(self) -> InterruptedRunError:
        """Return the error that ends the loop on a signal."""
        return interrupted(self.request, self.run, self.saved, self.trained.steps)

    def _stopped_at_once(self) -> AbstractContextManager[None]:
        """Within the block, a signal raises `Stopped` in a single process.

        Several stop together, after a step or a round of batches: elsewhere they cannot agree.
        """
        return self.request.at_once() if self.processes.world_size == 1 else nullcontext()


def interrupted(request: StopRequest, run: Path, done: int, steps: int) -> InterruptedRunError:
    """Return the error that says how far a stopped run came."""
    after = f"after step {done:,} of {steps:,}; saved in {run}" if done else f"before the first of {steps:,} steps"
    return InterruptedRunError(
        f"Stopped by {request.signal_name or 'a signal'} {after}.", hint="resume with the same command and {resume}"
    )


class _BestRecord(msgspec.Struct):
    evaluation: dict[str, float]
    tasks_sha256: dict[str, str]


def _best_record(run: Path) -> _BestRecord | None:
    path = run / BEST_FOLDER / DISTILLATION_FILE
    return msgspec.json.decode(path.read_bytes(), type=_BestRecord) if path.is_file() else None


def changed_tasks(run: Path, tasks: Mapping[str, str]) -> list[str]:
    """Return the names of tasks whose content is not that by which the student in `RUN/best` was chosen.

    Args:
        tasks: the fingerprint of each by its name.
    """
    best = _best_record(run)
    return _changed(best, tasks) if best else []


def _changed(best: _BestRecord, tasks: Mapping[str, str]) -> list[str]:
    return [name for name, sha256 in tasks.items() if best.tasks_sha256.get(name, sha256) != sha256]


def save_if_best(
    run: Path,
    student: ClipModel,
    evaluation: Mapping[str, float],
    *,
    provenance: Callable[[], dict[str, Any]],
    tasks: Mapping[str, str],
) -> bool:
    """Write the student to `RUN/best` if its mean score exceeds that of the student saved there, on the same tasks.

    Args:
        evaluation: one score per task, higher is better.
        provenance: returns the content of distillation.json, to which the evaluation is added. Called only if the
            student is written, since it hashes the teacher's weights.
        tasks: the fingerprint of each task by its name, as far as they are known.

    Returns:
        Whether the student was written.
    """
    if best := _best_record(run):
        # A resumed run may have others.
        same_tasks = best.evaluation.keys() == evaluation.keys() and not _changed(best, tasks)
        if same_tasks and statistics.fmean(evaluation.values()) <= statistics.fmean(best.evaluation.values()):
            return False
    record = {**provenance(), "evaluation": dict(evaluation), "tasks_sha256": dict(tasks)}
    save_clip(run / BEST_FOLDER, student, provenance=record)
    return True
