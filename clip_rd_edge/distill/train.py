"""The training loop, read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from clip_rd_edge.contract.encoder import Encoder
from clip_rd_edge.data.pairs import Pairs
from clip_rd_edge.distill.captions import freeze_all_but_projection
from clip_rd_edge.distill.config import RunConfig
from clip_rd_edge.distill.ingredients import Ingredients
from clip_rd_edge.distill.loader import StepSampler, ViewDataset, step_loader
from clip_rd_edge.distill.metrics import MetricsLog, geometry
from clip_rd_edge.distill.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from clip_rd_edge.distill.precision import AUTOCAST
from clip_rd_edge.distill.processes import Processes
from clip_rd_edge.distill.signals import stop_on_signals
from clip_rd_edge.distill.state import load_state, save_state, saved_states, seed_everything
from clip_rd_edge.distill.step import StepSettings, TrainingStep, clamp_scales
from clip_rd_edge.distill.teacher import TeacherOfBatches
from clip_rd_edge.errors import ClipRdEdgeError, InterruptedRunError
from clip_rd_edge.models.clip import ClipModel, to_device
from clip_rd_edge.models.encoder import TorchEncoder

# A few steps in a row without a finite loss mean that the run has diverged.
MAX_SKIPPED_IN_A_ROW = 5


@dataclass(frozen=True)
class Progress:
    """What a progress line shows after a step.

    Attributes:
        data_wait: share of the time spent waiting for batches.
        bad: samples left out or passed over since the start or resume.
    """

    step: int
    steps: int
    loss: float
    samples_per_second: float
    data_wait: float
    evaluation: dict[str, float]
    bad: int = 0


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
    on_progress: Callable[[Progress], None],
    evaluate: Callable[[Encoder], dict[str, float]] | None = None,
) -> None:
    """Train the student in place, from the newest checkpoint in `run` where there is one.

    Args:
        config: resolved; its precision is `fp32` or `bf16`, not `auto`.
        teacher: None where the objective needs none.
        evaluate: called with the student every `config.evaluate_every` steps; its figures go into the metrics.

    Raises:
        InterruptedRunError: a signal asked to stop; the state was saved.
        ClipRdEdgeError: the loss was not finite for some steps in a row; the last good checkpoint is named.
    """
    recipe, steps, student = config.recipe, total_steps(config, of.pairs), of.student
    seed_everything(config.seed)
    model = to_device(student.model, processes.device)
    objective = of.objective.to(processes.device)
    optimizer = build_optimizer(model, objective, recipe)
    start = load_state(run, model=model, objective=objective, optimizer=optimizer)
    step_of = TrainingStep(student, teacher, objective, processes, step_settings(config, AUTOCAST[recipe.precision]))
    log = MetricsLog(run, start=start) if processes.first else None
    sampler = StepSampler(
        len(of.pairs),
        recipe.batch_size,
        seed=config.seed,
        start=start,
        stop=steps,
        rank=processes.rank,
        processes=processes.count,
    )
    skipped = 0
    began = waiting_since = time.perf_counter()
    waited = 0.0

    def save(step: int) -> None:
        if processes.first:
            save_state(run, step, model=model, objective=objective, optimizer=optimizer)
        processes.wait()

    set_training_mode(student, config)
    with stop_on_signals() as stop:
        for step, batch in enumerate(step_loader(dataset, sampler, workers=config.workers), start=start):
            waited += time.perf_counter() - waiting_since
            set_learning_rate(optimizer, learning_rate_at(step, steps, recipe))
            result = step_of(batch, step)
            loss = result.loss.total.item()
            if math.isfinite(loss):
                skipped = 0
                if recipe.clip_gradient_norm:
                    trained = [p for group in optimizer.param_groups for p in group["params"]]
                    torch.nn.utils.clip_grad_norm_(trained, recipe.clip_gradient_norm)
                optimizer.step()
                clamp_scales(model, objective)
            else:
                skipped += 1
                _refuse_divergence(run, step, skipped)
            optimizer.zero_grad(set_to_none=True)

            done, evaluation = step + 1, {}
            if (
                processes.first
                and config.evaluate_every
                and evaluate
                and (done % config.evaluate_every == 0 or done == steps)
            ):
                evaluation = evaluate(TorchEncoder(student))
            elapsed = time.perf_counter() - began
            rate = (done - start) * recipe.batch_size / elapsed
            if log and (done % config.log_every == 0 or done == steps or evaluation or skipped):
                log.write(
                    {
                        "step": done,
                        "loss": loss if math.isfinite(loss) else None,
                        **{f"loss/{name}": term.item() for name, term in result.loss.terms.items()},
                        **geometry(result.embeddings),
                        "learning_rate": optimizer.param_groups[0]["lr"],
                        "logit_scale": student.logit_scale,
                        "samples_per_second": round(rate, 2),
                        "data_wait": round(waited / elapsed, 4),
                        "bad_samples": len(dataset.bad),
                        **{f"evaluation/{name}": value for name, value in evaluation.items()},
                    }
                )
            on_progress(Progress(done, steps, loss, rate, waited / elapsed, evaluation, len(dataset.bad)))
            stopping = processes.any(bool(stop))
            if done == steps or done % config.checkpoint_every == 0 or stopping:
                save(done)
                if stopping and done < steps:
                    raise InterruptedRunError(
                        f"Stopped by {stop.signal_name or 'a signal'} after step {done} of {steps}; saved in {run}.",
                        hint="the same command with --resume goes on from there",
                    )
            waiting_since = time.perf_counter()


def step_settings(config: RunConfig, autocast: torch.dtype | None) -> StepSettings:
    """How a run computes its steps, in the precision `autocast`."""
    return StepSettings(
        autocast=autocast,
        chunks=config.accumulate,
        block=config.loss_block,
        global_logits=config.global_logits,
        freeze_text=config.freeze_text,
        seed=config.seed,
    )


def set_training_mode(student: ClipModel, config: RunConfig) -> None:
    """Training mode; with `freeze_text`, the text tower learns nothing but its projection."""
    student.model.train()
    if config.freeze_text:
        freeze_all_but_projection(student.model.get_submodule("text"))


def _refuse_divergence(run: Path, step: int, skipped: int) -> None:
    if skipped >= MAX_SKIPPED_IN_A_ROW:
        good = saved_states(run)
        last = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was written yet"
        raise ClipRdEdgeError(
            f"The loss was not finite for {skipped} steps in a row, up to step {step + 1}; {last}.",
            hint="try a lower learning rate, or precision: fp32",
        )
