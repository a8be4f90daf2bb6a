"""What a quickstart is asked to do, and who watches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from clip_rd_edge.benchmark.report.markdown import write_report
from clip_rd_edge.benchmark.results import RESULTS, Results, read_results
from clip_rd_edge.benchmark.run import OpenEncoder, run_suite
from clip_rd_edge.benchmark.suite import Suite, read_suite
from clip_rd_edge.benchmark.throughput import Launch
from clip_rd_edge.contract.bundle import is_bundle
from clip_rd_edge.convert.calibration import calibration_set
from clip_rd_edge.convert.int8.select import Trial
from clip_rd_edge.data import emoji
from clip_rd_edge.distill.config import RunConfig, load_recipe
from clip_rd_edge.distill.metrics import Progress
from clip_rd_edge.distill.run import run_distillation
from clip_rd_edge.exporters.bundle import export_bundle
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.quickstart.teacher import build_teacher
from clip_rd_edge.utils.io import new_folder, shipped


class Watcher(Protocol):
    """Who is told how it goes."""

    def stage(self, number: int, stages: int, title: str) -> None:
        """A stage begins; numbers count from 1."""

    def progress(self, done: int, total: int, note: str) -> None:
        """How far the stage is."""

    def say(self, sentence: str) -> None:
        """Something was decided."""


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    Attributes:
        folder: where everything goes.
        student: a preset.
        recipe: how it is distilled.
        seed: of the student; the teacher's is 0 always.
        with_baseline: train the same student without a teacher, too, for as many steps.
        teacher_steps, student_steps: of 64 and 32 pairs.
    """

    folder: Path
    student: str = "resnet10t"
    recipe: str = "clip-rd"
    seed: int = 0
    with_baseline: bool = False
    teacher_steps: int = 600
    student_steps: int = 1100


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


def run_quickstart(
    settings: Settings, watch: Watcher, open_encoder: OpenEncoder, launch: Launch | None = None
) -> Results:
    """Run every stage that is not done yet; returns what was measured.

    Args:
        open_encoder: opens a bundle or a model's folder for the benchmark.
        launch: as `benchmarking.run.run_suite` takes it.

    Raises:
        UsageError: the folder holds a quickstart with other settings.
        InterruptedRunError: a signal asked to stop; the same call goes on from there.
    """
    stages: list[tuple[str, Callable[[Settings, Watcher], None]]] = [
        ("Draw the data set", _draw),
        ("Tune the teacher", tune_teacher),
        ("Distil the student", distil),
        *([("Train the same student alone", train_alone)] if settings.with_baseline else []),
        ("Export to ONNX FP32 and FP16", _export_floats),
        ("Quantise to INT8", _quantise),
        ("Compare all of them", lambda s, w: _compare(s, w, open_encoder, launch)),
    ]
    for number, (title, run) in enumerate(stages, start=1):
        watch.stage(number, len(stages), title)
        run(settings, watch)
    return read_results(settings.folder / "report" / RESULTS)


def _draw(settings: Settings, watch: Watcher) -> None:
    pairs = emoji.training_pairs()
    watch.say(f"{len(emoji.concepts()):,} emoji in two art styles; {len(pairs):,} pairs to train on, 760 to test by")


def _export_floats(settings: Settings, watch: Watcher) -> None:
    _export(settings, watch, "fp32")
    _export(settings, watch, "fp16")


def _quantise(settings: Settings, watch: Watcher) -> None:
    _export(settings, watch, "int8")


def _export(settings: Settings, watch: Watcher, precision: Literal["fp32", "fp16", "int8"]) -> None:
    bundle = settings.folder / "bundles" / precision
    if is_bundle(bundle):
        return
    clip = load_clip(str(settings.folder / "student"))
    calibration = None
    if precision == "int8":
        calibration = calibration_set(
            emoji.training_pairs(), preprocessing=clip.preprocessing, tokenize=TorchEncoder(clip).tokenize
        )
    export_bundle(
        clip,
        bundle,
        precision=precision,
        calibration=calibration,
        fallback="fp32",  # a machine on which INT8 is not worth it gets its report, too
        labels=[concept.name for concept in emoji.concepts()],
        provenance={"model": "quickstart", "recipe": settings.recipe, "student": settings.student},
        source=None if precision == "fp32" else settings.folder / "bundles" / "fp32",
        progress=lambda what: watch.progress(0, 1, what),
        on_trials=lambda trials: _tell(watch, trials),
    )


def _tell(watch: Watcher, trials: Sequence[Trial]) -> None:
    """What was tried, and what became of it."""
    for trial in trials:
        watch.say(
            f"{trial.tower} tower, {trial.name}: {1 / trial.latency_ratio:.2f}× as fast as FP32, "
            f"centred cosine {trial.centred_cosine:.4f}, {trial.size_ratio:.2f}× the size: {trial.verdict}"
        )


def _compare(settings: Settings, watch: Watcher, open_encoder: OpenEncoder, launch: Launch | None) -> None:
    report, suite = settings.folder / "report", quickstart_suite(settings.folder)
    if (report / RESULTS).is_file() and read_results(report / RESULTS).suite == suite:
        return
    results = run_suite(suite, open_encoder, lambda what, done, total: watch.progress(done, total, what), launch=launch)
    with new_folder(report) as folder:
        write_report(results, folder)


def quickstart_suite(folder: Path) -> Suite:
    """The shipped suite over a quickstart's folder, without the baseline where it was not trained."""
    suite = read_suite(shipped("benchmarks/suites/quickstart.yaml"))
    rows = tuple(row for row in suite.rows if row.role != "baseline" or (folder / row.model).is_dir())
    return msgspec.structs.replace(suite, root=str(folder), rows=rows)
