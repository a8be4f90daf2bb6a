"""The quickstart's three trainings: the teacher's tuning, the student, and the same student alone."""

from __future__ import annotations

from pathlib import Path

import msgspec

from clip_rd_edge.distill.config import RunConfig, load_recipe
from clip_rd_edge.distill.metrics import Progress
from clip_rd_edge.distill.run import run_distillation
from clip_rd_edge.quickstart.settings import Settings, Watcher
from clip_rd_edge.quickstart.teacher import build_teacher

IMAGE_SIZE = 64  # pixels: what emoji need, and two cores can train on


def tune_teacher(settings: Settings, watch: Watcher) -> None:
    """Tune the embedded teacher on the training pairs; small batches learn more here than few large ones."""
    start = build_teacher(settings.folder / "teacher-untuned", image_size=IMAGE_SIZE)
    _run(
        settings.folder / "teacher",
        watch,
        recipe="clip",
        steps=settings.teacher_steps,
        batch_size=64,
        learning_rate=1e-3,
        student=f"local-dir:{start}",
        freeze_text=True,
        seed=0,  # the same teacher for every student, so that seeds of students can be compared
    )


def distil(settings: Settings, watch: Watcher) -> None:
    """Distil the student from the tuned teacher."""
    _train_student(settings, watch, settings.folder / "student", settings.recipe)


def train_alone(settings: Settings, watch: Watcher) -> None:
    """Train the same student on the pairs alone, for as many steps."""
    _train_student(settings, watch, settings.folder / "student-alone", "clip")


def _train_student(settings: Settings, watch: Watcher, run: Path, recipe: str) -> None:
    _run(
        run,
        watch,
        recipe=recipe,
        steps=settings.student_steps,
        batch_size=32,
        learning_rate=2e-3,
        student=settings.student,
        teacher=str(settings.folder / "teacher") if load_recipe(recipe).objective.need_teacher else None,
        text="tiny",
        seed=settings.seed,
    )


def _run(
    run: Path,
    watch: Watcher,
    *,
    recipe: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
    student: str,
    seed: int,
    teacher: str | None = None,
    text: str = "standard",
    freeze_text: bool = False,
) -> None:
    config = RunConfig(
        recipe_name=recipe,
        recipe=msgspec.structs.replace(
            load_recipe(recipe), steps=steps, batch_size=batch_size, learning_rate=learning_rate
        ),
        data="emoji",
        teacher=teacher,
        student=student,
        image_size=IMAGE_SIZE,
        text=text,
        context_length=16,
        embedding_size=256,
        freeze_text=freeze_text,
        seed=seed,
        checkpoint_every=100,
    )

    def show(progress: Progress) -> None:
        note = f"loss {progress.loss:.2f}, {progress.samples_per_second:.0f} pairs/s"
        watch.progress(progress.step, progress.steps, note)

    run_distillation(config, run, resume=True, on_progress=show, say=watch.say)
