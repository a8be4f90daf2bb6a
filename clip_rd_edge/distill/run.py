"""A whole run: from a configuration to a folder with a student that open_clip loads.

config.yaml      the resolved configuration
metrics.jsonl    one line a log step
checkpoints/     all state, for --resume
student/         the trained model, an open_clip local-dir; written last, so that a run without one is unfinished
report/          plots
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from clip_rd_edge.contract.checkpoint import LOCAL_DIR, STUDENT_FOLDER, WEIGHTS_FILE, model_folder
from clip_rd_edge.contract.encoder import Encoder
from clip_rd_edge.contract.files import sha256_of, write_text
from clip_rd_edge.contract.structs import read_yaml, to_yaml
from clip_rd_edge.data.bad import BadSamples
from clip_rd_edge.data.pairs import Pairs, load_pairs, require_batch
from clip_rd_edge.distill.config import RunConfig, first_difference
from clip_rd_edge.distill.loader import StepSampler, ViewDataset, step_loader
from clip_rd_edge.distill.plots import plot_run
from clip_rd_edge.distill.precision import AUTOCAST, choose_precision
from clip_rd_edge.distill.processes import Processes, join_processes
from clip_rd_edge.distill.state import seed_everything
from clip_rd_edge.distill.step import TrainingStep
from clip_rd_edge.distill.teacher import Teacher
from clip_rd_edge.distill.train import Progress, set_training_mode, step_settings, total_steps, train
from clip_rd_edge.errors import UsageError
from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.models.checkpoint import save_clip
from clip_rd_edge.models.clip import ClipModel, to_device
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.models.student import build_student, student_config

CONFIG_FILE, REPORT_FOLDER = "config.yaml", "report"
_SAMPLES_OF_FIGURES = 512


def run_distillation(
    config: RunConfig,
    run: Path,
    *,
    resume: bool,
    on_progress: Callable[[Progress], None],
    say: Callable[[str], None],
    evaluate: Callable[[Encoder], dict[str, float]] | None = None,
) -> Path:
    """Train what `config` describes into the folder `run`; returns the student's folder.

    Args:
        resume: go on from the newest checkpoint in `run` where there is one; a finished run is left as it is.
        say: told in a sentence what was decided, such as the precision.

    Raises:
        UsageError: `run` holds something and `resume` is false, or holds a run of another configuration.
        InputError, ConfigError: data, teacher or student do not fit.
        InterruptedRunError: a signal asked to stop; the state was saved.
    """
    with join_processes() as processes:
        return _run(
            config,
            run,
            processes,
            resume=resume,
            on_progress=on_progress,
            say=say if processes.first else _silent,
            evaluate=evaluate,
        )


def _silent(_: str) -> None:
    """Processes but the first say nothing."""


def _run(
    config: RunConfig,
    run: Path,
    processes: Processes,
    *,
    resume: bool,
    on_progress: Callable[[Progress], None],
    say: Callable[[str], None],
    evaluate: Callable[[Encoder], dict[str, float]] | None,
) -> Path:
    config, fresh = _agree_with_folder(config, run, resume=resume)
    processes.wait()  # before the first writes: the others would find the folder in use
    if (run / STUDENT_FOLDER / WEIGHTS_FILE).is_file():
        say(f"{run} is finished already")
        return run / STUDENT_FOLDER
    pairs = load_pairs(
        config.data,
        image_key=config.image_key,
        caption_key=config.caption_key,
        weights=config.weights,
        json_key=config.json_key,
    )
    if pairs.left_out:
        say(f"{len(pairs.left_out):,} samples are no pairs and left out, the first: {pairs.left_out[0]}")
    require_batch(pairs, config.recipe.batch_size, processes=processes.count)
    objective = Objective(config.recipe.objective, scales=config.recipe.scales, scale_start=config.recipe.scale_start)
    teacher = _load_teacher(config, objective)
    student = _make_student(config, run, teacher)
    if fresh or config.recipe.precision == "auto":
        say(f"{len(pairs):,} pairs, {total_steps(config, pairs):,} steps of {config.recipe.batch_size}")
        config = _with_measured_precision(config, student, teacher, objective, pairs, processes, say)
        if processes.first:
            write_text(run / CONFIG_FILE, to_yaml(config))
    autocast = AUTOCAST[config.recipe.precision]
    frozen = Teacher(teacher, processes.device, autocast=autocast) if teacher else None
    train(
        config,
        run,
        student=student,
        teacher=frozen,
        objective=objective,
        pairs=pairs,
        processes=processes,
        on_progress=on_progress,
        evaluate=evaluate,
    )
    if not processes.first:
        return run / STUDENT_FOLDER
    student.model.to("cpu")
    plot_run(run, run / REPORT_FOLDER, _similarities(student, teacher, pairs, config.max_bad))
    save_clip(run / STUDENT_FOLDER, student, provenance=_provenance(config, run, pairs, teacher))
    return run / STUDENT_FOLDER


def _agree_with_folder(config: RunConfig, run: Path, *, resume: bool) -> tuple[RunConfig, bool]:
    """The configuration to run, and whether the run is new: a resumed run keeps the precision it was measured to be."""
    path = run / CONFIG_FILE
    if not (run.exists() and (run.is_file() or any(run.iterdir()))):
        return config, True
    if not resume:
        raise UsageError(
            f"The output {run} exists already and is not empty.",
            hint="choose another -o, or go on with that run by --resume",
        )
    if not path.is_file():
        return config, True
    old = read_yaml(path, RunConfig)
    if config.recipe.precision == "auto":
        recipe = msgspec.structs.replace(config.recipe, precision=old.recipe.precision)
        config = msgspec.structs.replace(config, recipe=recipe)
    if difference := first_difference(old, config):
        raise UsageError(
            f"{run} holds a run of another configuration: {difference}.",
            hint="give the same options as before, or choose another -o",
        )
    return config, False


def _load_teacher(config: RunConfig, objective: Objective) -> ClipModel | None:
    if not objective.needs_teacher:
        return None
    if config.teacher is None:
        raise UsageError(
            f"The recipe {config.recipe_name} needs a teacher.",
            hint="--teacher local-dir:PATH, or a name with --teacher-pretrained; --recipe clip trains without one",
        )
    return load_clip(config.teacher, pretrained=config.teacher_pretrained)


def _make_student(config: RunConfig, run: Path, teacher: ClipModel | None) -> ClipModel:
    seed_everything(config.seed)
    if config.student.startswith(LOCAL_DIR):
        student = load_clip(config.student)
    else:
        width = teacher.embedding_size if teacher else config.embedding_size
        described = student_config(
            config.student,
            embedding_size=width,
            image_size=config.image_size,
            text=config.text,
            context_length=config.context_length,
        )
        student = build_student(described, name=run.resolve().name)
    if teacher and teacher.embedding_size != student.embedding_size:
        raise UsageError(
            f"The student's embeddings have {student.embedding_size} entries, the teacher's {teacher.embedding_size}.",
            hint="distil into a student made for this teacher: give a preset or a timm name",
        )
    return student


def _with_measured_precision(
    config: RunConfig,
    student: ClipModel,
    teacher: ClipModel | None,
    objective: Objective,
    pairs: Pairs,
    processes: Processes,
    say: Callable[[str], None],
) -> RunConfig:
    """The configuration with `auto` replaced by what is faster on this machine."""
    alone = Processes(device=processes.device)
    to_device(student.model, alone.device)
    set_training_mode(student, config)

    def step_in(autocast: torch.dtype | None) -> TrainingStep:
        # A teacher of its own, so that the captions it remembers do not stay.
        frozen = Teacher(teacher, alone.device, autocast=autocast) if teacher else None
        settings = step_settings(config, autocast)
        return TrainingStep(student, frozen, objective.to(alone.device), alone, settings)

    dataset = ViewDataset(
        pairs,
        student.preprocessing,
        teacher.preprocessing if teacher else None,
        crop_scale=config.recipe.crop_scale,
        seed=config.seed,
        max_bad=config.max_bad,
    )
    own = config.recipe.batch_size // processes.count
    batch = next(iter(step_loader(dataset, StepSampler(len(pairs), own, seed=config.seed, start=0, stop=1), workers=0)))
    chosen, reason = choose_precision(config.recipe.precision, step_in, batch)
    if processes.any(chosen == "fp32"):  # they have to agree
        chosen = "fp32"
    say(f"precision: {reason}")
    recipe = msgspec.structs.replace(config.recipe, precision=chosen)
    return msgspec.structs.replace(config, recipe=recipe)


def _similarities(student: ClipModel, teacher: ClipModel | None, pairs: Pairs, max_bad: float) -> dict[str, Any]:
    """Embeddings of some pairs by student and teacher, for the histograms."""
    chosen = np.random.default_rng(0).permutation(len(pairs))[:_SAMPLES_OF_FIGURES]
    bad = BadSamples(pairs, max_share=max_bad)
    sound = [bad.take(int(i)) for i in chosen]
    images, captions = [pair.image for pair in sound], [pair.captions[0] for pair in sound]
    models = {"student": student, **({"teacher": teacher} if teacher else {})}
    encoders = {who: TorchEncoder(clip) for who, clip in models.items()}
    return {who: (e.encode_images(images), e.encode_texts(captions)) for who, e in encoders.items()}


def _provenance(config: RunConfig, run: Path, pairs: Pairs, teacher: ClipModel | None) -> dict[str, Any]:
    teacher_folder = model_folder(config.teacher) if config.teacher else None
    weights = teacher_folder / WEIGHTS_FILE if teacher_folder else None
    return {
        "recipe": config.recipe_name,
        "configuration": msgspec.to_builtins(config),
        "teacher": teacher.name if teacher else None,
        "teacher_sha256": sha256_of(weights) if weights and weights.is_file() else None,
        "data": config.data,
        "pairs": len(pairs),
        "steps": total_steps(config, pairs),
        "seed": config.seed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()} {platform.system()}",
        "versions": {
            name: version(name) for name in ("clip-rd-edge", "torch", "open_clip_torch", "timm", "numpy", "pillow")
        },
    }
