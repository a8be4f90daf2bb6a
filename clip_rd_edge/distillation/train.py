"""The training loop, read from top to bottom."""

from __future__ import annotations

import dataclasses
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import torch

from clip_rd_edge.contract.checkpoint import DISTILLATION_FILE
from clip_rd_edge.contract.encoder import Encoder
from clip_rd_edge.data.pairs import Pairs
from clip_rd_edge.distillation.build import Ingredients, provenance
from clip_rd_edge.distillation.checkpoint import Stateful, load_state, save_state, seed_everything
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.distributed import Processes
from clip_rd_edge.distillation.loader import StepSampler, ViewDataset, step_loader
from clip_rd_edge.distillation.metrics import MetricsLog, Progress, TensorBoardLog, peak_memory_on, step_line
from clip_rd_edge.distillation.optim import Update
from clip_rd_edge.distillation.quantized.tower import Quantization
from clip_rd_edge.distillation.step import AUTOCAST, StepSettings, TrainingStep
from clip_rd_edge.distillation.teacher import TeacherOfBatches, freeze_all_but_projection
from clip_rd_edge.errors import InterruptedRunError
from clip_rd_edge.models.clip import ClipModel, to_device
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.utils.reporting import SILENT, Reporter


def total_steps(config: RunConfig, pairs: Pairs) -> int:
    """Steps of a run: the recipe's `steps`, or its epochs of whole batches."""
    return config.recipe.steps or config.recipe.epochs * (len(pairs) // config.recipe.batch_size)


def train(
    config: RunConfig,
    run: Path,
    of: Ingredients,
    *,
    teacher: TeacherOfBatches | None,
    dataset: ViewDataset,
    processes: Processes,
    reporter: Reporter = SILENT,
    evaluate: Callable[[Encoder], dict[str, float]] | None = None,
) -> ClipModel:
    """Train the student, from the newest checkpoint in `run` where there is one; returns what is to be kept of it.

    Args:
        config: resolved; its precision is not `auto`.
        teacher: None where the objective needs none.
        evaluate: called with the student every `config.evaluate_every` steps and at the end; its figures go into the
            metrics, and the best student is kept as `RUN/best`.

    Raises:
        InterruptedRunError: a signal asked to stop; the state was saved.
        ClipRdEdgeError: the loss was not finite for some steps in a row; the last good checkpoint is named.
    """
    recipe, steps, student = config.recipe, total_steps(config, of.pairs), of.student
    seed_everything(config.seed)
    model = to_device(student.model, processes.device)
    objective = of.objective.to(processes.device)
    set_training_mode(student, config)
    update = Update(model, objective, recipe, steps=steps)
    parts: dict[str, Stateful] = {"model": model, "objective": objective, "update": update}
    quantization = Quantization() if config.quantize else None
    if quantization:
        parts["ranges"] = quantization.ranges
    start = load_state(run, parts)
    kept = dataclasses.replace(student, model=update.model_to_keep)
    if quantization and start == 0:
        quantization.calibrate(student, dataset, config)
    step_of = TrainingStep(
        student,
        teacher,
        objective,
        processes,
        step_settings(config, AUTOCAST[recipe.precision]),
        image_tower=quantization.tower(student) if quantization else None,
    )
    encoder = TorchEncoder(kept, image_tower=quantization.tower(kept) if quantization else None)
    log = MetricsLog(run, start=start) if processes.first else None
    board = TensorBoardLog(run, start=start) if processes.first and config.report_to == "tensorboard" else None
    sampler = StepSampler(
        len(of.pairs),
        recipe.batch_size,
        seed=config.seed,
        start=start,
        stop=steps,
        rank=processes.rank,
        processes=processes.count,
    )
    began = waiting_since = time.perf_counter()
    waited = 0.0

    with stop_on_signals() as stop:
        for step, batch in enumerate(step_loader(dataset, sampler, workers=config.workers), start=start):
            waited += time.perf_counter() - waiting_since
            result = step_of(batch, step, loss_scale=update.loss_scale)
            loss = result.loss.total.item()
            update.make(step, loss, run=run)

            done, evaluation = step + 1, dict[str, float]()
            last = done == steps
            due = last or (config.evaluate_every and done % config.evaluate_every == 0)
            if due and evaluate and processes.first:
                evaluation = evaluate(encoder)
                keep_if_best(run, kept, evaluation, provenance=partial(provenance, config, of, steps=done))
            elapsed = time.perf_counter() - began
            bad = processes.total(dataset.bad.found)
            progress = Progress(
                step=done,
                steps=steps,
                loss=loss,
                samples_per_second=(done - start) * recipe.batch_size / elapsed,
                data_wait=waited / elapsed,
                evaluation=evaluation,
                bad=dataset.bad.left_out + bad,
                skipped=update.skipped,
                memory_bytes=peak_memory_on(processes.device),
            )
            if log and (last or evaluation or done % config.log_every == 0):
                extra = {
                    "learning_rate": update.learning_rate,
                    "gradient_norm": update.gradient_norm,
                    "logit_scale": student.logit_scale,
                }
                line = step_line(progress, result.loss.terms, result.embeddings, extra)
                log.write(line)
                if board:
                    board.write(line)
            reporter.update("training", done, steps, progress.message())
            if evaluation:
                reporter.say(f"step {done}: {progress.evaluation_message()}")
            dataset.bad.check_total(bad)
            stopping = processes.any(bool(stop))
            if last or stopping or done % config.checkpoint_every == 0:
                if processes.first:
                    save_state(run, done, parts)
                processes.wait()
            if stopping and not last:
                raise InterruptedRunError(
                    f"Stopped by {stop.signal_name or 'a signal'} after step {done} of {steps}; saved in {run}.",
                    hint="the same command with --resume goes on from there",
                )
            waiting_since = time.perf_counter()
    return kept


def step_settings(config: RunConfig, autocast: torch.dtype | None) -> StepSettings:
    """How a run computes its steps, in the precision `autocast`."""
    return StepSettings(
        autocast=autocast,
        chunks=config.accumulate,
        block=config.loss_block,
        global_logits=config.global_logits,
        freeze_text=config.freeze_text,
        compile=config.compile,
        seed=config.seed,
    )


def set_training_mode(student: ClipModel, config: RunConfig) -> None:
    """Training mode; with `freeze_text`, the text tower learns nothing but its projection.

    With `quantize` it is evaluation mode: batch norms, which become part of convolutions, keep their figures.
    """
    student.model.train(config.quantize is None)
    if config.gradient_checkpointing:
        student.model.set_grad_checkpointing(True)  # type: ignore[operator]
    if config.freeze_text:
        freeze_all_but_projection(student.model.get_submodule("text"))


BEST_FOLDER = "best"


class _Record(msgspec.Struct):
    evaluation: dict[str, float]


def keep_if_best(
    run: Path, student: ClipModel, evaluation: Mapping[str, float], *, provenance: Callable[[], dict[str, Any]]
) -> bool:
    """Write the student to `RUN/best` where the mean of its figures is above that of the one there.

    Args:
        evaluation: a figure a task, greater is better.
        provenance: gives what its distillation.json is to say, to which the evaluation is added; asked only where it
            is written, since it takes the hash of the teacher's weights.

    Returns:
        whether it was written.
    """
    path = run / BEST_FOLDER / DISTILLATION_FILE
    if path.is_file():
        before = msgspec.json.decode(path.read_bytes(), type=_Record).evaluation
        if statistics.fmean(evaluation.values()) <= statistics.fmean(before.values()):
            return False
    save_clip(run / BEST_FOLDER, student, provenance={**provenance(), "evaluation": dict(evaluation)})
    return True


class StopRequest:
    """Whether a signal asked the run to stop; false until then."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block, the first SIGINT or SIGTERM sets the request, and a second SIGINT interrupts at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python delivers signals to the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_name = signal.Signals(number).name

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
