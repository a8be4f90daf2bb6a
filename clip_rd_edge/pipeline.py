"""The stages of the quickstart, from the built-in data set to a benchmark report."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import msgspec

from clip_rd_edge.benchmarking.latency import Launch
from clip_rd_edge.benchmarking.report import HTML, write_report
from clip_rd_edge.benchmarking.results import RESULTS, Results, published, read_results
from clip_rd_edge.benchmarking.run import OpenEncoder, run_suite
from clip_rd_edge.benchmarking.suite import Suite, read_suite
from clip_rd_edge.building.plan import (
    FROZEN_TEXT_LAYERS,
    TEXT_LAYERS,
    VIEWS,
    VOCABULARY,
    built_in_teacher,
    relative_steps,
)
from clip_rd_edge.bundle.manifest import is_bundle, read_manifest
from clip_rd_edge.bundle.runs import LOCAL_DIR, STUDENT_FOLDER, WEIGHTS_FILE
from clip_rd_edge.data import emoji
from clip_rd_edge.distillation.config import Precision, RunConfig, load_recipe
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.errors import InputError, InterruptedRunError
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.calibration import calibration_set
from clip_rd_edge.exporting.plan import Plan, package_versions
from clip_rd_edge.models.edit import write_trimmed
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.models.stitch import class_nouns
from clip_rd_edge.models.students import build_student, student_config
from clip_rd_edge.settings.measuring import Quickstart
from clip_rd_edge.utils.files import sha256_of, write_bytes, write_text
from clip_rd_edge.utils.host import instruction_sets
from clip_rd_edge.utils.outputs import require_free_output
from clip_rd_edge.utils.paths import Typed, is_file, is_folder, shipped_path, typed

IMAGE_SIZE = 64  # pixels: enough for emoji, and feasible to train on two cores
CONTEXT_LENGTH = 16  # the longest name in the data set has 12 tokens, including the start and end tokens
_STEPS = 1100  # of the student
EMBEDDING_SIZE = 384  # the sentence encoder's
FROZEN_LAYERS = 4  # of its image tower, while it is tuned
_STUDENT_DIGEST = "student_sha256"  # in a bundle's provenance: of the file of the student's weights


def run_quickstart(request: Quickstart, open_encoder: OpenEncoder, launch: Launch | None = None) -> Results:
    """Run all stages that are not complete yet; return the benchmark results.

    Args:
        open_encoder: opens a bundle or a model folder for the benchmark.
        launch: as `benchmarking.run.run_suite` takes it.
    """
    folder, reporter = Path(request.output), request.reporter
    require_free_output(folder, overwrite=True)  # stages that are complete stay
    report = folder / "report"
    require_free_output(report, overwrite=is_file(report / RESULTS))  # it may be somebody's own
    # The student is built again minutes later, after the teacher is tuned: report at once what will fail then.
    photo_tasks(request)
    load_recipe(request.recipe)
    architecture = student_config(
        request.student,
        embedding_size=EMBEDDING_SIZE,
        image_size=IMAGE_SIZE,
        text="tiny",  # in place of the trimmed one, which is not there yet
        context_length=CONTEXT_LENGTH,
    )
    build_student(architecture, name=request.student)
    train_alone = partial(train_student, name="student-alone", recipe="clip")
    stages: list[tuple[str, Callable[[Quickstart], None]]] = [
        ("Render the data set", _render_pairs),
        ("Tune the teacher", _tune_teacher),
        ("Trim the teacher's text tower", trim_text),
        ("Distil the student", partial(train_student, name="student", recipe=request.recipe)),
        *([("Train the same student without a teacher", train_alone)] if request.with_baseline else []),
        ("Export to ONNX FP32 and FP16", _export_floats),
        ("Quantise to INT8", partial(_export, precision="int8")),
        ("Compare all models", partial(_compare, open_encoder=open_encoder, launch=launch)),
    ]
    for number, (title, run_stage) in enumerate(stages, start=1):
        reporter.begin(title, number, len(stages))
        try:
            run_stage(request)
        except KeyboardInterrupt:  # outside the trainings, which save their state: the stage begins anew
            raise InterruptedRunError(
                f"Interrupted in stage {number} of {len(stages)}; the stages before it are kept.",
                hint="run the same command again to resume",
            ) from None
    return read_results(report / RESULTS)


def _render_pairs(request: Quickstart) -> None:
    pairs, concepts = emoji.training_pairs(), len(emoji.concepts())
    request.reporter.note(f"{concepts:,} emoji in two art styles; {len(pairs):,} pairs for training, 760 for testing")


def _tune_teacher(request: Quickstart) -> None:
    """Tune the teacher; if it is not tuned yet, or is tuned again, what is made from it is made anew."""
    folder = Path(request.output)
    if not is_file(folder / "teacher" / STUDENT_FOLDER / WEIGHTS_FILE):
        shutil.rmtree(folder / "trimmed", ignore_errors=True)
        _forget_results(folder)
    tune_teacher(request)


def tune_teacher(request: Quickstart) -> None:
    """Tune the built-in teacher on the training pairs; here, many small batches train better than few large ones.

    It has learnt from photographs, and would only forget them in its first layers: frozen, they take half of the time,
    and the result is better.
    """
    folder = Path(request.output) / "teacher-untuned"
    start = built_in_teacher(folder, image_size=IMAGE_SIZE, context_length=CONTEXT_LENGTH, reporter=request.reporter)
    _train(
        request,
        "teacher",
        recipe="clip",
        steps=request.teacher_steps,
        batch_size=64,
        learning_rate=1e-3,
        student=f"{LOCAL_DIR}{start}",
        freeze_text=True,
        freeze_image=FROZEN_LAYERS,
        freeze_norms=True,
        seed=0,  # the same teacher for all students, so that students of different seeds can be compared
    )


def trim_text(request: Quickstart) -> None:
    """Write what the student's text tower starts from: a part of the teacher's, with the tokens that nouns need.

    The texts that decide which tokens stay are kept beside it, one per line: captions and nouns of all kinds.
    """
    folder = Path(request.output)
    trimmed = folder / "trimmed"
    if trimmed.is_dir():
        return
    texts = captions_and_nouns()
    write_text(folder / "nouns.txt", "".join(f"{text}\n" for text in texts))
    write_trimmed(
        typed(folder / "teacher"), trimmed, layers=TEXT_LAYERS, vocabulary=VOCABULARY, texts=texts,
        reporter=request.reporter,
    )  # fmt: skip


def captions_and_nouns() -> list[str]:
    """Return texts such as a student of the built-in data may meet: its training captions, and nouns of all kinds."""
    return list(dict.fromkeys([*chain.from_iterable(emoji.training_pairs().texts), *class_nouns()]))


def train_student(request: Quickstart, *, name: str, recipe: str) -> None:
    """Train the student, from the tuned teacher if the recipe has one."""
    folder = Path(request.output)
    taught = {"teacher": str(folder / "teacher"), "store": str(folder / "store")}
    steps = request.student_steps or round(_STEPS * relative_steps(request.student))
    _train(
        request,
        name,
        recipe=recipe,
        steps=steps,
        batch_size=32,
        learning_rate=2e-3,
        student=request.student,
        text=str(folder / "trimmed"),
        freeze_text_layers=FROZEN_TEXT_LAYERS,
        views=VIEWS,
        tasks=(Typed("emoji:unseen-style"),),  # for the plots alone: the last student is taken, whatever its accuracy
        evaluate_every=max(1, steps // 5),
        seed=request.seed,
        # AMX halves what a product of the student takes; the teacher's depthwise convolutions gain nothing from it.
        precision="bf16" if "AMX BF16" in instruction_sets() else "fp32",
        **(taught if load_recipe(recipe).objective.needs_teacher else {}),
    )


def _train(
    request: Quickstart,
    name: str,
    *,
    recipe: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
    precision: Precision = "fp32",
    **rest: Any,
) -> None:
    loaded = load_recipe(recipe)
    config = RunConfig(
        recipe_name=Typed(recipe),
        recipe=msgspec.structs.replace(
            loaded,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            # Not measured, or the models would depend on what else the machine is doing.
            precision=precision if loaded.precision == "auto" else loaded.precision,
        ),
        teacher_precision=precision,
        data=Typed("emoji"),
        image_size=IMAGE_SIZE,
        context_length=CONTEXT_LENGTH,
        embedding_size=EMBEDDING_SIZE,
        checkpoint_every=100,
        **rest,
    )
    run_distillation(config, Path(request.output) / name, resume=True, reporter=request.reporter)


def _export_floats(request: Quickstart) -> None:
    _export(request, precision="fp32")
    _export(request, precision="fp16")


def _export(request: Quickstart, *, precision: Literal["fp32", "fp16", "int8"]) -> None:
    folder = Path(request.output)
    bundle = folder / "bundles" / precision
    student = sha256_of(folder / "student" / STUDENT_FOLDER / WEIGHTS_FILE)
    if is_bundle(bundle) and read_manifest(bundle).provenance.get(_STUDENT_DIGEST) == student:
        return
    _forget_results(folder)
    clip = load_clip(typed(folder / "student"))
    samples = None
    if precision == "int8":
        samples = calibration_set(
            emoji.training_pairs(),
            preprocessing=clip.preprocessing,
            tokenize=TorchEncoder(clip).tokenize,
            seen=True,
        )
    provenance = {"model": "quickstart", "recipe": request.recipe, "student": request.student, _STUDENT_DIGEST: student}
    converted = export_bundle(
        clip,
        bundle,
        Plan(
            precision=precision,
            fallback="fp32",  # machines on which INT8 does not pay off still get a report
            labels=tuple(concept.name for concept in emoji.concepts()),
            provenance={**provenance, **package_versions()},
        ),
        samples=samples,
        source=None if precision == "fp32" else folder / "bundles" / "fp32",
        overwrite=True,  # an export of another student, which was trained here before
        reporter=request.reporter,
    )
    for trial in converted.trials:
        figures = (
            f"{1 / trial.latency_ratio:.2f}× as fast as FP32, centred cosine {trial.centred_cosine:.4f}, "
            f"{trial.size_ratio:.2f}× the size: "
        )
        request.reporter.note(f"{trial.tower} tower, {trial.name}: {figures if trial.measured else ''}{trial.verdict}")


def _forget_results(folder: Path) -> None:
    """Have the models measured anew, since the figures of a report are of earlier ones.

    The results file stays, but empty: without it, a report would count as the user's own, and be kept.
    """
    if is_file(results := folder / "report" / RESULTS):
        write_bytes(results, b"")


def _compare(request: Quickstart, *, open_encoder: OpenEncoder, launch: Launch | None) -> None:
    report, suite = Path(request.output) / "report", quickstart_suite(request)
    is_known = is_file(report / RESULTS) and (report / RESULTS).stat().st_size > 0
    results = read_results(report / RESULTS) if is_known else None
    if results is None or results.suite != published(suite):
        results = run_suite(suite, open_encoder, request.reporter, launch=launch)
        (report / HTML).unlink(missing_ok=True)  # it is written last: where it is missing, the report is unfinished
    elif (report / HTML).is_file():
        return
    write_report(results, report)  # file by file, as others in the folder are the user's


def quickstart_suite(request: Quickstart) -> Suite:
    """Return the shipped suite for a quickstart, without the baseline if it was not trained, and with photographs."""
    folder, suite = Path(request.output), read_suite(shipped_path("benchmarks/suites/quickstart.yaml"))
    rows = tuple(row for row in suite.rows if row.role != "baseline" or (folder / row.model).is_dir())
    return msgspec.structs.replace(suite, root=str(folder), rows=rows, tasks=suite.tasks + photo_tasks(request))


def photo_tasks(request: Quickstart) -> tuple[str, ...]:
    """Return the tasks in a folder of photographs: `photographs`, and `photographs-LANGUAGE` with other labels."""
    if request.photos is None:
        return ()
    photos = Path(request.photos)
    folders = sorted(photos.glob("photographs*")) if is_folder(photos) else []
    tasks = tuple(str(path.resolve()) for path in folders if path.is_dir())
    if not tasks:
        raise InputError(
            f"{photos} has no folder named photographs.",
            hint="write it with: python -m benchmarks.data.tuxpaint FOLDER",
        )
    return tasks
