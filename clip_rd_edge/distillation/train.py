"""The training loop."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from clip_rd_edge.contract.checkpoint import DISTILLATION_FILE
from clip_rd_edge.contract.encoder import Encoder
from clip_rd_edge.data.pairs import Pairs
from clip_rd_edge.data.unpaired import MixedSamples
from clip_rd_edge.distillation.bank import make_bank
from clip_rd_edge.distillation.build import RunSetup, provenance
from clip_rd_edge.distillation.checkpoint import (
    BEST_FOLDER,
    Stateful,
    load_checkpoint,
    save_checkpoint,
    seed_everything,
)
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.freezing import set_training_mode
from clip_rd_edge.distillation.loader import StepSampler, ViewDataset, step_loader
from clip_rd_edge.distillation.monitoring.evaluation import EncoderOfAllProcesses
from clip_rd_edge.distillation.monitoring.metrics import MetricsLog, Progress, metrics_line, peak_memory_on
from clip_rd_edge.distillation.monitoring.trackers import Tracker, open_tracker
from clip_rd_edge.distillation.optim import RunOptimizer, diverged_error, named_divergence
from clip_rd_edge.distillation.processes.distributed import Processes
from clip_rd_edge.distillation.processes.signals import Stopped, StopRequest, stop_on_signals
from clip_rd_edge.distillation.quantized.tower import Quantization
from clip_rd_edge.distillation.step import AUTOCAST, StepSettings, TrainingStep
from clip_rd_edge.distillation.teacher import BatchTeacher, caption_batch_size
from clip_rd_edge.errors import InterruptedRunError, UsageError
from clip_rd_edge.models.clip import ClipModel, to_device
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.utils.reporting import SILENT, Reporter


def total_steps(config: RunConfig, pairs: Pairs) -> int:
    """Return the number of steps of a run: the recipe's `steps`, or its epochs times the full batches per epoch."""
    return config.recipe.steps or config.recipe.epochs * (len(pairs) // config.recipe.batch_size)


def train(
    config: RunConfig,
    run: Path,
    setup: RunSetup,
    *,
    teacher: BatchTeacher | None,
    dataset: ViewDataset,
    processes: Processes,
    reporter: Reporter = SILENT,
    evaluate: Callable[[Encoder], dict[str, float]] | None = None,
) -> ClipModel:
    """Train the student, from the newest checkpoint in `run` if there is one; return the model to save.

    Args:
        config: resolved; its precision is not `auto`.
        teacher: None if the objective does not need one.
        evaluate: called with the student every `config.evaluate_every` steps and at the end, in all processes with an
            encoder that they share. Its scores are added to the metrics, and the best student is saved as `RUN/best`.

    Raises:
        ConfigError: there are checkpoints, but all are damaged.
        InterruptedRunError: a signal requested a stop; the state was saved.
        ClipRdEdgeError: the loss was not finite for several steps in a row; the message names the last good checkpoint.
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
    bank = make_bank(config, len(setup.pairs), dataset.cache, setup.ensemble, processes.device)
    if bank:
        parts["bank"] = bank
    start = load_checkpoint(run, parts, processes, reporter=reporter)
    if start:
        reporter.say(f"resumed after step {start:,} of {steps:,}")
    saved_student = dataclasses.replace(student, model=optimizer.model_to_save)
    if quantization and start == 0:
        quantization.calibrate(student, dataset, config)
    training_step = TrainingStep(
        student,
        teacher,
        objective,
        processes,
        step_settings(config, AUTOCAST[recipe.precision], processes.device),
        image_tower=quantization.tower(student) if quantization else None,
        bank=bank,
    )
    encoder = TorchEncoder(saved_student, image_tower=quantization.tower(saved_student) if quantization else None)
    log = MetricsLog(run, start=start) if processes.is_main else None
    tracker = open_tracker(config, run, start=start, reporter=reporter) if processes.is_main else Tracker()
    sampler = StepSampler(
        setup.pairs.groups,
        recipe.batch_size,
        seed=config.seed,
        start=start,
        stop=steps,
        rank=processes.rank,
        processes=processes.world_size,
        prefetch=setup.pairs.prefetch,
    )
    waited = evaluated = 0.0  # seconds

    def is_evaluation_due(done: int) -> bool:
        return done == steps or (config.evaluate_every > 0 and done % config.evaluate_every == 0)

    def scores(done: int) -> dict[str, float]:
        """Evaluate after `done` steps; empty if that is not due, or if a signal ends it: the resumed run repeats it."""
        if not (evaluate and is_evaluation_due(done)):
            return {}
        processes.broadcast(saved_student.model.buffers())  # those that are saved
        try:
            # Several processes stop together, after a round of batches.
            with request.at_once() if processes.world_size == 1 else nullcontext(), named_divergence(run):
                evaluation = evaluate(EncoderOfAllProcesses(encoder, processes, request))
        except Stopped:
            return {}
        if processes.is_main:
            save_if_best(run, saved_student, evaluation, provenance=partial(provenance, config, setup, steps=done))
        return evaluation

    saved, due = start, False  # the last step that was saved, and whether there is a newer one to save

    def save(done: int, *, is_stopping: bool) -> None:
        """Save the state after `done` steps if it is due.

        A skipped step changes no weight, but may be the first of a run that diverges: unless this is the last chance to
        save, the older checkpoint is the better one.
        """
        nonlocal saved, due
        due = due or done % config.checkpoint_every == 0
        if not (due or is_stopping or done == steps):
            return
        is_fit = optimizer.is_finite if is_stopping else optimizer.is_sound
        if processes.sum(int(not is_fit)) == [0]:
            if processes.is_main:
                save_checkpoint(run, done, parts)
            saved, due = done, False
        elif processes.sum(int(not optimizer.is_finite)) != [0]:
            raise diverged_error(run, f"weights are not finite after step {done:,}")
        processes.barrier()

    with stop_on_signals() as request, request.deferred(), tracker:
        is_evaluated = log is None or log.is_evaluated(start)
        if start and processes.any(not is_evaluated) and (evaluation := scores(start)) and log:
            tracker.add(log.add_evaluation(start, evaluation))
        started = time.perf_counter()
        batches = step_loader(dataset, sampler, workers=config.workers)
        for step in range(start, steps):
            waiting_since = time.perf_counter()
            try:
                # Several processes stop together, after a step: here they cannot agree.
                with request.at_once() if processes.world_size == 1 else nullcontext():
                    batch = next(batches)
            except Stopped:
                if step > saved and optimizer.is_finite:
                    save_checkpoint(run, step, parts)
                    saved = step
                raise interrupted(request, run, saved, steps) from None
            waited += time.perf_counter() - waiting_since
            try:
                result = training_step(batch, step, loss_scale=optimizer.loss_scale)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UsageError(
                    "A batch norm of the student sees a single image in a part of a batch, and cannot scale by its "
                    "spread.",
                    hint="a larger --batch-size, a lower --accumulate, fewer processes, or --freeze-norms",
                ) from error
            loss = result.loss.total.item()
            optimizer.apply(step, loss, run=run)

            done = step + 1
            unshared, stop_requests = processes.sum(dataset.bad.unshared, int(bool(request)))
            if unshared:
                dataset.bad.share(processes.gather_objects)
            stopping = stop_requests > 0
            save(done, is_stopping=stopping)  # before an evaluation, which may fail, as for a damaged image
            trained = time.perf_counter()
            evaluation = scores(done)
            now = time.perf_counter()
            evaluated += now - trained
            elapsed = now - started
            progress = Progress(
                step=done,
                steps=steps,
                loss=loss,
                samples_per_second=(done - start) * recipe.batch_size / (elapsed - evaluated),
                data_wait=waited / (elapsed - evaluated),
                seconds_per_step=elapsed / (done - start),
                evaluation=evaluation,
                bad=len(dataset.bad),
                skipped=optimizer.skipped,
                memory_bytes=peak_memory_on(processes.device),
                samples="samples" if isinstance(setup.pairs, MixedSamples) else "pairs",
            )
            if log and (done == steps or evaluation or done % config.log_every == 0):
                extra = {
                    "learning_rate": optimizer.learning_rate,
                    "gradient_norm": optimizer.gradient_norm,
                    "logit_scale": student.logit_scale,
                }
                line = metrics_line(progress, result.loss.terms, result.embeddings, extra)
                log.write(line)
                tracker.write(line)
            reporter.update("training", done, steps, progress.message())
            if evaluation:
                reporter.say(f"step {done:,}: {progress.evaluation_message()}")
            if not stopping and is_evaluation_due(done) and processes.any(bool(request)):
                stopping = True
                if done > saved:
                    save(done, is_stopping=True)
            if stopping:
                raise interrupted(request, run, saved, steps)
        if request:  # during the evaluation of a run whose last step was done before
            raise interrupted(request, run, steps, steps)
    return saved_student


def interrupted(request: StopRequest, run: Path, done: int, steps: int) -> InterruptedRunError:
    """Return the error that says how far a stopped run came."""
    after = f"after step {done:,} of {steps:,}; saved in {run}" if done else f"before the first of {steps:,} steps"
    return InterruptedRunError(
        f"Stopped by {request.signal_name or 'a signal'} {after}.", hint="resume with the same command and --resume"
    )


def caption_batch(config: RunConfig, device: torch.device) -> int:
    """Return the number of captions per pass through a frozen text tower, of teacher or student."""
    images = -(-config.recipe.batch_size // (config.processes * config.accumulate))
    return caption_batch_size(images, device)


def step_settings(config: RunConfig, autocast: torch.dtype | None, device: torch.device) -> StepSettings:
    """Return the step settings of a run, for the precision `autocast`."""
    return StepSettings(
        autocast=autocast,
        chunks=config.accumulate,
        block=config.loss_block,
        global_logits=config.global_logits,
        freeze_text=config.freeze_text,
        caption_batch=caption_batch(config, device),
        compile=config.compile,
        recompute=config.gradient_checkpointing,
        seed=config.seed,
    )


class _BestRecord(msgspec.Struct):
    evaluation: dict[str, float]


def save_if_best(
    run: Path, student: ClipModel, evaluation: Mapping[str, float], *, provenance: Callable[[], dict[str, Any]]
) -> bool:
    """Write the student to `RUN/best` if its mean score exceeds that of the student saved there, on the same tasks.

    Args:
        evaluation: one score per task, higher is better.
        provenance: returns the content of distillation.json, to which the evaluation is added. Called only if the
            student is written, since it hashes the teacher's weights.

    Returns:
        Whether the student was written.
    """
    path = run / BEST_FOLDER / DISTILLATION_FILE
    if path.is_file():
        best = msgspec.json.decode(path.read_bytes(), type=_BestRecord).evaluation
        same_tasks = best.keys() == evaluation.keys()  # a resumed run may have others
        if same_tasks and statistics.fmean(evaluation.values()) <= statistics.fmean(best.values()):
            return False
    save_clip(run / BEST_FOLDER, student, provenance={**provenance(), "evaluation": dict(evaluation)})
    return True
