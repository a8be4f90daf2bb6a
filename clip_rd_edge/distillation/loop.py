"""The training loop: a step, and what follows it."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from clip_rd_edge.bundle.runs import (
    DISTILLATION_FILE,
    EVALUATION_PREFIX,
    PREDICTIONS_FILE,
    REPORT_FOLDER,
    TERM_PREFIX,
    read_training_record,
)
from clip_rd_edge.data.order import StepSampler
from clip_rd_edge.distillation.checkpoint import BEST_FOLDER, load_checkpoint, save_checkpoint, seed_everything
from clip_rd_edge.distillation.loader import Batch, ViewDataset, step_loader
from clip_rd_edge.distillation.metrics import (
    MetricsLog,
    embedding_geometry,
    last_evaluation,
    peak_memory_on,
    plot_predictions,
    plot_run,
)
from clip_rd_edge.distillation.optimizer import RunOptimizer, diverged_error, named_divergence
from clip_rd_edge.distillation.processes import Stopped
from clip_rd_edge.distillation.setup import RunSetup, provenance
from clip_rd_edge.distillation.step import AUTOCAST, StepResult, TrainingStep, step_settings
from clip_rd_edge.distillation.store import QueueBank, make_bank
from clip_rd_edge.distillation.student import set_training_mode
from clip_rd_edge.distillation.teacher import BatchTeacher
from clip_rd_edge.errors import in_one_line
from clip_rd_edge.models.clip import ClipModel, to_device
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.utils.host import FREED_MEMORY_KEPT

if TYPE_CHECKING:
    from clip_rd_edge.distillation.quantized import ActivationRanges
    from clip_rd_edge.distillation.run import Evaluate, Run
    from clip_rd_edge.distillation.trackers import Tracker


# A GPU is waited for where a number is read: in steps between two looks at whether the run diverges, and in seconds
# between two looks at its loss.
_CHECK_EVERY, _SHOW_EVERY_S = 10, 1.0


class TrainingState:
    """What training changes, restored from the run's newest checkpoint; student and objective are on the device.

    Args:
        teacher: None if the objective does not need one.
        bank_source: names the teachers whose embeddings a bank holds.

    Attributes:
        done, steps: completed steps, and steps in total.
        saved: the last step whose state was saved.
        parts: what a checkpoint holds, by its key there.
        student, encoder: what is saved and evaluated: the moving average if there is one, else the trained model.
        ranges: those of the rounding that the student is trained under, if any.
    """

    def __init__(
        self, run: Run, setup: RunSetup, teacher: BatchTeacher | None, dataset: ViewDataset, *, bank_source: str
    ) -> None:
        config, recipe, processes = run.config, run.config.recipe, run.processes
        self.steps, self.bad = setup.total_steps(config), dataset.bad
        seed_everything(config.seed)
        model = to_device(setup.student.model, processes.device)
        objective = setup.objective.to(processes.device)
        set_training_mode(setup.student, config)
        self.optimizer = RunOptimizer(model, objective, recipe, steps=self.steps)
        self.parts: dict[str, Any] = {"model": model, "objective": objective, "update": self.optimizer}
        self.ranges: ActivationRanges | None = None
        if config.quantize:
            from clip_rd_edge.distillation.quantized import ActivationRanges  # which imports the exporter's

            self.parts["ranges"] = self.ranges = ActivationRanges()
        count = len(setup.pairs)
        bank = make_bank(config, count, dataset.store, setup.ensemble, processes.device, source=bank_source)
        if isinstance(bank, QueueBank):
            self.parts["bank"] = bank
        self.done = self.saved = load_checkpoint(run.folder, self.parts, processes, reporter=run.reporter)
        if self.done:
            run.reporter.note(f"resumed after step {self.done:,} of {self.steps:,}")
        self.student = dataclasses.replace(setup.student, model=self.optimizer.model_to_save)
        if self.ranges and not self.done:
            self.ranges.measure(setup.student, dataset, config)
        self._compute = TrainingStep(
            setup.student,
            teacher,
            objective,
            processes,
            step_settings(config, AUTOCAST[recipe.precision], processes.device),
            image_tower=self.ranges.tower(setup.student) if self.ranges else None,
            bank=bank,
        )
        self.encoder = self.encoder_of(self.student)

    def encoder_of(self, student: ClipModel) -> TorchEncoder:
        """Return what evaluates a student of the run, under the rounding that the run trains for."""
        return TorchEncoder(student, image_tower=self.ranges.tower(student) if self.ranges else None)

    def train_on(self, batch: Batch, folder: Path) -> StepResult:
        """Update the weights with the gradients of a batch."""
        result = self._compute(batch, self.done, loss_scale=self.optimizer.loss_scale)
        self.optimizer.apply(self.done, result.loss.total)
        self.done += 1
        if self.done % _CHECK_EVERY == 0 or self.done == self.steps:  # the same steps in all processes
            self.optimizer.require_progress(self.done, run=folder)
        return result


class Training:
    """The steps of a run, and what follows each of them.

    Attributes:
        scores: of the evaluation after it; empty without one.
        is_stopping: whether the run ends after this step, as a signal has requested in one of the processes.
    """

    scores: Mapping[str, float] = {}
    is_stopping = _is_save_due = False
    _message, _next_look_s = "", 0.0

    def __init__(self, run: Run, setup: RunSetup, state: TrainingState, dataset: ViewDataset) -> None:
        self.run, self.setup, self.state, self.dataset = run, setup, state, dataset
        self._start, is_main = state.done, run.processes.is_main
        self._log = MetricsLog(run.folder, start=self._start) if is_main else None
        self._tracker: Tracker | None = None
        if is_main and run.config.report_to:
            from clip_rd_edge.distillation.trackers import open_tracker

            self._tracker = open_tracker(run.config, run.folder, start=self._start, reporter=run.reporter)
        self._clock = _Clock()

    def __call__(self) -> None:
        """Train from where the state is to the last step."""
        run, state = self.run, self.state
        hooks = (self.save, self.evaluate, self.end_early, self.report, self.draw, self.stop)
        with run.stop.deferred(), self._tracker or nullcontext(), FREED_MEMORY_KEPT:
            self._repeat_evaluation()
            self.end_early()
            self._clock = _Clock()
            for batch in self._batches():
                self.result = state.train_on(batch, run.folder)
                self._exchange()
                for hook in hooks:  # in this order: an evaluation that fails loses no step
                    hook()
            self.stop()  # as requested during the evaluation of a run whose last step was done before

    def _batches(self) -> Iterator[Batch]:
        """Yield the batches; a signal that arrives meanwhile stops a single process, its state saved."""
        run, state, recipe = self.run, self.state, self.run.config.recipe
        sampler = StepSampler(
            self.setup.pairs.groups,
            recipe.batch_size,
            seed=run.config.seed,
            steps=range(self._start, state.steps),
            rank=run.processes.rank,
            processes=run.processes.world_size,
            prefetch=self.setup.pairs.prefetch,
        )
        batches = step_loader(self.dataset, sampler, workers=run.config.workers, note=run.reporter.note)
        # Several processes stop together, after a step: elsewhere they cannot agree.
        stopped_at_once = run.stop.at_once if run.processes.world_size == 1 else nullcontext
        while state.done < state.steps:
            try:
                with self._clock.counting("waited"), stopped_at_once():
                    batch = next(batches)
            except Stopped:
                if state.done > state.saved and state.optimizer.is_finite:
                    save_checkpoint(run.folder, state.done, state.parts)
                    state.saved = state.done
                raise run.interrupted(state.saved, state.steps) from None
            yield batch

    def _exchange(self) -> None:
        """Share a stop request in one process, and its bad samples, with all processes."""
        processes = self.run.processes
        processes.meet()
        unshared, stop_requests = processes.sum(self.state.bad.unshared, int(bool(self.run.stop)))
        if unshared:
            self.state.bad.share(processes.gather_objects)
        self.is_stopping = stop_requests > 0

    def save(self) -> None:
        """Save the state if it is due.

        A skipped step changes no weight, but may be the first of a run that diverges: unless this is the last chance to
        save, the older checkpoint is the better one.
        """
        run, state, optimizer = self.run, self.state, self.state.optimizer
        self._is_save_due = self._is_save_due or state.done % run.config.checkpoint_every == 0
        if not (self._is_save_due or self.is_stopping or state.done == state.steps):
            return
        is_fit = optimizer.is_finite if self.is_stopping else optimizer.is_sound
        if not run.processes.any(not is_fit):
            if run.processes.is_main:
                save_checkpoint(run.folder, state.done, state.parts)
            state.saved, self._is_save_due = state.done, False
        elif run.processes.any(not optimizer.is_finite):
            raise diverged_error(run.folder, f"weights are not finite after step {state.done:,}")
        run.processes.barrier()

    @property
    def _is_evaluation_due(self) -> bool:
        every = self.run.config.evaluate_every
        return self.state.done == self.state.steps or (every > 0 and self.state.done % every == 0)

    def evaluate(self) -> None:
        """Evaluate in the main process if that is due; if a signal ends it, the resumed run repeats it."""
        self.scores = {}
        if self.run.evaluate and self._is_evaluation_due:
            with self._clock.counting("evaluated"):
                self.scores = self.run.processes.on_main(partial(self._score, self.run.evaluate))

    @property
    def _evaluation(self) -> dict[str, float]:
        """The scores as in a line of metrics.jsonl."""
        return {f"{EVALUATION_PREFIX}{name}": value for name, value in self.scores.items()}

    def _score(self, evaluate: Evaluate) -> dict[str, float]:
        """Return the student's scores, and save it if they are the best; none if a signal has ended the evaluation."""
        run, state = self.run, self.state
        try:
            with run.stop.at_once(), named_divergence(run.folder):
                scores = evaluate(state.encoder)
        except Stopped:
            return {}
        path = run.folder / BEST_FOLDER / DISTILLATION_FILE
        best: dict[str, float] = msgspec.json.decode(path.read_bytes())["evaluation"] if path.is_file() else {}
        # A resumed run may have other tasks.
        if best.keys() != scores.keys() or statistics.fmean(scores.values()) > statistics.fmean(best.values()):
            record = {**provenance(run.config, self.setup, steps=state.done), "evaluation": scores}
            save_clip(run.folder / BEST_FOLDER, state.student, provenance=record)
        return scores

    def _repeat_evaluation(self) -> None:
        """Evaluate after the last step of the interrupted run, if that was due and a signal ended it."""
        is_missing = self._log is not None and not last_evaluation(self.run.folder, step=self._start)
        if self._start and self.run.processes.any(is_missing):
            self.evaluate()
            if self.scores and self._log:
                line = {"step": self._start, **self._evaluation}
                self._log.write(line)
                if self._tracker:
                    self._tracker.add(line)

    def end_early(self) -> None:
        """Make this step the last one if as many evaluations as the run's patience have not been better."""
        run, state = self.run, self.state
        if run.config.patience and self._is_evaluation_due and state.done < state.steps:
            best = run.processes.from_main(read_training_record(str(run.folder / BEST_FOLDER)).get("steps", state.done))
            if state.done - best >= run.config.patience * run.config.evaluate_every:
                run.reporter.note(f"training ends after step {state.done:,}: none was better than step {best:,}")
                state.steps = state.done

    def report(self) -> None:
        """Show how far the run is, and log it if that is due."""
        run, state, config = self.run, self.state, self.run.config
        if self._log is None:  # that of another process
            return
        is_logged = state.done == state.steps or bool(self.scores) or state.done % config.log_every == 0
        if is_logged or self._clock.elapsed >= self._next_look_s:
            loss = self.result.loss.total.item()  # first: the time of what was still to be computed counts
            figures = self._figures()
            self._message, self._next_look_s = self._summary(loss, figures), self._clock.elapsed + _SHOW_EVERY_S
            if is_logged:
                line = {
                    "step": state.done,
                    "loss": loss if math.isfinite(loss) else None,
                    **{f"{TERM_PREFIX}{name}": term.item() for name, term in self.result.loss.terms.items()},
                    **embedding_geometry(self.result.embeddings),
                    "learning_rate": state.optimizer.learning_rate,
                    "gradient_norm": state.optimizer.gradient_norm.item(),
                    "logit_scale": self.setup.student.logit_scale,
                    **figures,
                    **self._evaluation,
                }
                self._log.write(line)
                if self._tracker:
                    self._tracker.write(line)
            if self.scores:
                scores = ", ".join(f"{name} {value:.1%}" for name, value in self.scores.items())
                run.reporter.note(f"step {state.done:,}: {scores}")
        run.reporter.update("training", state.done, state.steps, self._message)

    def _figures(self) -> dict[str, float]:
        """Return the speed, without the time of evaluations but in seconds per step, and what goes with it."""
        state, clock, elapsed = self.state, self._clock, self._clock.elapsed
        done, trained_s = state.done - self._start, elapsed - clock.evaluated
        return {
            "samples_per_second": round(done * self.run.config.recipe.batch_size / trained_s, 2),
            "data_wait": round(clock.waited / trained_s, 4),
            "seconds_per_step": float(f"{elapsed / done:.4g}"),
            "memory_mb": round(peak_memory_on(self.run.processes.device) / 1e6),
            "bad_samples": len(state.bad),
            "skipped_steps": state.optimizer.skipped,
        }

    def _summary(self, loss: float, figures: Mapping[str, float]) -> str:
        bad = f", {figures['bad_samples']:,} bad samples" if figures["bad_samples"] else ""
        samples = "samples" if self.setup.pairs.counts.is_mixed else "pairs"
        return (
            f"loss {loss:.3f}, {figures['samples_per_second']:.0f} {samples}/s, "
            f"{figures['memory_mb'] / 1e3:.1f} GB{bad}, {figures['data_wait']:.0%} waiting for data"
        )

    def draw(self) -> None:
        """After an evaluation, plot the run so far, and show the tracker what the student predicts."""
        run, done = self.run, self.state.done
        if not (run.processes.is_main and self._is_evaluation_due):
            return
        report = run.folder / REPORT_FOLDER
        with self._clock.counting("evaluated"):
            try:
                report.mkdir(exist_ok=True)
                if self.setup.tasks or (run.config.report_to == "tensorboard" and self.setup.pairs.counts.pairs):
                    path, task = report / PREDICTIONS_FILE, next(iter(self.setup.tasks), None)
                    plot_predictions(task, self.setup.pairs, self.state.encoder, path)
                    if self._tracker:
                        self._tracker.show(done, path)
                if done < self.state.steps:  # else it is plotted once the student is saved
                    plot_run(run.folder, report)
            except Exception as error:  # noqa: BLE001 - a run must not end by its plots
                run.reporter.note(f"the plots of step {done:,} could not be drawn: {in_one_line(error)}")

    def stop(self) -> None:
        """End the run if a signal has requested that, its state saved."""
        state = self.state
        if not self.is_stopping and self._is_evaluation_due and self.run.processes.any(bool(self.run.stop)):
            self.is_stopping = True
            if state.done > state.saved:
                self.save()
        if self.is_stopping:
            raise self.run.interrupted(state.saved, state.steps)


class _Clock:
    """Counts seconds from when it is made, and how many of them go into waiting for batches and into evaluating."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.waited = self.evaluated = 0.0

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._started

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        since = self.elapsed
        yield
        setattr(self, name, getattr(self, name) + self.elapsed - since)
