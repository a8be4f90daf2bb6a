"""The stages of a build. Each keeps its result in the output folder, and does nothing where that is still right.

look.json, train.csv, held-out/   see `building.look`
teacher/, teacher.json            the built-in teacher, if no other is named, and its accuracy on what is held out
trimmed/                          the text tower that the student starts from
plan.yaml                         see `building.plan`
run/, store/                      the training; the teacher's embeddings
bundles/TARGET/                   what goes to the device
report/, verdict.md               the models compared, and what follows
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from clip_rd_edge.benchmarking.accuracy import ZeroShotPredictions, predict
from clip_rd_edge.benchmarking.accuracy import evaluate as score
from clip_rd_edge.benchmarking.metrics import primary_metric
from clip_rd_edge.benchmarking.report import HTML, write_report
from clip_rd_edge.benchmarking.results import RESULTS, published, read_results
from clip_rd_edge.benchmarking.run import OpenEncoder, run_suite
from clip_rd_edge.benchmarking.suite import Role, Suite, SuiteRow
from clip_rd_edge.building.look import HELD_OUT, LOOK, PAGE, TRAIN, Look, look, task_of, write_task
from clip_rd_edge.building.plan import (
    BATCH,
    FROZEN_TEXT_LAYERS,
    LIVE_ABOVE,
    PLAN,
    VIEWS,
    Plan,
    asked_of,
    built_in_teacher,
    choose_student,
    context_length_for,
    image_size_for,
    is_here,
    kept_plan,
    reasons,
    require_measurable,
    run_config,
    start_of,
    steps_of,
    training_precision,
    trim_text_tower_of,
)
from clip_rd_edge.building.verdict import VERDICT, verdict
from clip_rd_edge.bundle.formats import format_named
from clip_rd_edge.bundle.manifest import is_bundle, read_manifest
from clip_rd_edge.bundle.runs import (
    CALIBRATION_FILE,
    LOCAL_DIR,
    STUDENT_FOLDER,
    WEIGHTS_FILE,
    read_training_record,
)
from clip_rd_edge.data.folders import Folder
from clip_rd_edge.data.tasks import Task, ZeroShotTask, load_task
from clip_rd_edge.distillation.checkpoint import BEST_FOLDER
from clip_rd_edge.distillation.metrics import last_evaluation
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.distillation.setup import note_overlap
from clip_rd_edge.distillation.speed import measure_speed
from clip_rd_edge.errors import InterruptedRunError, UsageError
from clip_rd_edge.exporting.bundle import export_model
from clip_rd_edge.exporting.calibration import MIN_PAIRS, kept_pairs
from clip_rd_edge.exporting.plan import Plan as ExportPlan
from clip_rd_edge.exporting.plan import plan_exports
from clip_rd_edge.models.encoder import TorchEncoder, text_layers
from clip_rd_edge.models.load import known_config, load_clip
from clip_rd_edge.models.stitch import class_nouns
from clip_rd_edge.runtime.labels import label_names
from clip_rd_edge.runtime.verify import verify_bundle
from clip_rd_edge.settings.deploying import Export, Fallback
from clip_rd_edge.settings.measuring import Build
from clip_rd_edge.utils.files import sha256_of, write_bytes, write_text
from clip_rd_edge.utils.outputs import exclusive_writer, require_free_output
from clip_rd_edge.utils.paths import Typed, is_file, several, typed
from clip_rd_edge.utils.structs import commented_yaml, read_json, to_json
from clip_rd_edge.utils.text import as_word

_EVALUATIONS, _MAX_UNSAVED = 10, 100  # in a run, and steps between checkpoints
# The training ends after this many evaluations without a better one, where there are enough images to tell.
_PATIENCE, _TELLING = 4, 100
_RECIPE, _RATE = "clip-kd-bank", 1e-3
_SURE, _SHOWN_DOUBTS = 0.9, 3  # probability of another class, of labels that are shown as doubtful
_DIGEST, _KEPT = "student_sha256", ".measured"


class TeacherScore(msgspec.Struct, frozen=True, kw_only=True):
    """What the teacher makes of the images that are held out, without training on any: what is possible.

    Attributes:
        key: what the stages up to the plan follow from: a digest of images and labels, the teacher, size and seed.
        top1: with the labels as they are; of captions, R@1.
        doubtful: images that the teacher is sure are of another class, which may be wrong labels.
    """

    key: str
    images: int
    top1: float
    doubtful: tuple[str, ...] = ()


@dataclass
class Building:
    """A build in progress.

    Attributes:
        open_encoder: opens a folder or a name on one thread.
        found, plan: what the stages so far have settled.
    """

    request: Build
    open_encoder: OpenEncoder
    found: Look = field(init=False)
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        self.folder, self.reporter = Path(self.request.output), self.request.reporter
        self.run, self.held_out = self.folder / "run", self.folder / HELD_OUT
        self.bundle = self.folder / "bundles" / self.request.target
        given = self.request.teacher
        self.teacher = typed(given) if given is not None else Typed(f"{LOCAL_DIR}{self.folder / 'teacher'}")

    def __call__(self) -> list[str]:
        """Run what is not done yet; return the verdict."""
        self._refuse_in_advance()
        stages: Sequence[tuple[str, Callable[[], None]]] = (
            ("Look at the images, and hold some back", self.look),
            ("See what the teacher makes of them", self.teach),
            ("Choose the student", self.choose),
            ("Distil the student", self.distil),
            (f"Export it for {self.request.target}", self.export),
            ("Verify the bundle", self.verify),
            ("Compare", self.compare),
        )
        with exclusive_writer(self.folder):
            for number, (title, stage) in enumerate(stages, start=1):
                self.reporter.begin(title, number, len(stages))
                try:
                    stage()
                except KeyboardInterrupt:
                    raise InterruptedRunError(
                        f"Interrupted in stage {number} of {len(stages)}; the stages before it are kept.",
                        hint="run the same command again to resume",
                    ) from None
        return (self.folder / VERDICT).read_text(encoding="utf-8").split("\n\n")[:-1]

    def _refuse_in_advance(self) -> None:
        """Refuse at once what would fail after hours."""
        _require_bundle_target(self.request)
        require_measurable(self.request)
        if Path(self.request.data).resolve() in (self.folder.resolve(), *self.folder.resolve().parents):
            raise UsageError(
                f"The output {self.folder} lies in {self.request.data}, whose folders are classes.",
                hint="name an {output} beside it",
                option="output",
            )
        if not is_file(self.folder / LOOK):  # or it was killed before that was written
            hidden = [path.name for path in self.folder.glob(".*")]
            require_free_output(self.folder, overwrite=False, ignoring=(*hidden, TRAIN, HELD_OUT, PAGE))
        for task in several(self.request.tasks):
            load_task(task)
        if self.request.teacher is not None:
            known_config(self.teacher)

    # Each stage below is called in this order.

    def look(self) -> None:
        """Look at the images, and hold some back."""
        request, plan = self.request, kept_plan(self.request)
        self.found = look(
            typed(request.data), self.folder, share=request.hold_out, labels=label_names(request.labels),
            columns=(request.csv_img_key, request.csv_caption_key), kept=plan.data if plan else None,
            reporter=self.reporter,
        )  # fmt: skip
        if plan:
            self.plan = plan
        for line in self.found.lines:
            self.reporter.note(line)
        parts = {part: len(self.found.of(part)) for part in ("train", "choose", "test")}
        self.reporter.note(
            f"{parts['train']:,} to train on; held out: {parts['test']:,} for the report, {parts['choose']:,} to "
            f"choose by, in {self.held_out}"
        )

    def teach(self) -> None:
        """Make the built-in teacher if no other is named, and measure the teacher on what is held out."""
        size, path = image_size_for(self.request, self.found), self.folder / "teacher.json"
        key = f"{self.found.key} {self.teacher} {size} {self.request.seed}"
        known = read_json(path, TeacherScore) if is_file(path) else None
        if known is None or known.key != key:  # what there is was made for another call, which ended before its plan
            for name in ("teacher", "trimmed", "store")[self.request.teacher is not None :]:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        if self.request.teacher is None:
            built_in_teacher(
                self.folder / "teacher", image_size=size, context_length=context_length_for(self.found),
                reporter=self.reporter,
            )  # fmt: skip
        if known is None or known.key != key or not self.held_out.is_dir():
            encoder = TorchEncoder(load_clip(self.teacher))
            if self.found.kind == "images":
                self._name_images(encoder)
            known = self._score_teacher(encoder, key)
            write_bytes(path, to_json(known))
        what = "find their caption first" if self.found.kind == "captions" else "get the right label"
        if self.found.kind == "images":
            self.reporter.note(f"it has named {known.images:,} images that are held out, to compare the student with")
        else:
            self.reporter.note(f"without training, {known.top1:.1%} of {known.images:,} images {what}")
        if known.doubtful:
            self.reporter.note(f"labels to check: {'; '.join(known.doubtful)}")

    def _score_teacher(self, encoder: TorchEncoder, key: str) -> TeacherScore:
        task = load_task(typed(task_of(self.folder, self.found, "test")))
        predictions = predict(encoder, task, reporter=self.reporter)
        top1, doubtful = primary_metric(predictions.score), tuple[str, ...]()
        # The doubts of a teacher that is mostly wrong mean nothing.
        if isinstance(task, ZeroShotTask) and isinstance(predictions, ZeroShotPredictions) and top1 > 0.5:
            doubtful = doubtful_labels(task, predictions.labels, predictions.probabilities)
        return TeacherScore(key=key, images=len(task.images), top1=top1, doubtful=doubtful)

    def _name_images(self, encoder: TorchEncoder) -> None:
        """Write the task of images without captions, with the teacher's answers as their classes."""
        rows = [*self.found.of("choose"), *self.found.of("test")]
        asked = ZeroShotTask(
            name="naming", images=tuple(Path(row.path) for row in rows), targets=(0,) * len(rows),
            labels=self.found.labels,
        )  # fmt: skip
        answers = predict(encoder, asked, reporter=self.reporter)
        assert isinstance(answers, ZeroShotPredictions)
        named = [
            msgspec.structs.replace(row, caption=self.found.labels[n])
            for row, n in zip(rows, answers.labels, strict=True)
        ]
        write_task(self.held_out, self.found, named)

    def choose(self) -> None:
        """Choose the student, and make what its text tower starts from."""
        trimmed, size = self.folder / "trimmed", image_size_for(self.request, self.found)
        if not trimmed.is_dir():
            captions = [row.caption for row in self.found.of("train")]
            texts = list(dict.fromkeys([*captions, *self.found.labels, *class_nouns()]))
            trim_text_tower_of(self.teacher, trimmed, texts, self.reporter)
        if not hasattr(self, "plan"):
            name, count = choose_student(self.request, image_size=size), len(self.found.of("train"))
            self.plan = Plan(
                data=self.found.key, asked=asked_of(self.request), student=name, start=start_of(name, self.teacher),
                image_size=size, precision=training_precision(), views=VIEWS if count <= LIVE_ABOVE else 0,
                recipe=_RECIPE, batch_size=min(BATCH, count), learning_rate=_RATE,
                frozen_text_layers=min(FROZEN_TEXT_LAYERS, len(text_layers(load_clip(typed(trimmed))))),
            )  # fmt: skip
        for line in reasons(self.plan):
            self.reporter.note(line)

    def distil(self) -> None:
        """Train the student, for as many steps as the hours allow."""
        if self.plan.steps and is_file(self.run / STUDENT_FOLDER / WEIGHTS_FILE):
            return self.reporter.note(f"{self._steps_done():,} steps are done, in {self.run}")
        settings = self._run_settings()
        if not self.plan.steps:
            config = run_config(self.request, self.plan, steps=1, **settings)
            speed = None if self.request.steps else measure_speed(config, self.run, reporter=self.reporter)
            steps, why = steps_of(self.request, self.plan, self.found, speed)
            self.reporter.note(f"{steps:,} steps, {why}")
            self.plan = msgspec.structs.replace(self.plan, steps=steps)
            note_overlap(config, [load_task(task) for task in several(self.request.tasks)], reporter=self.reporter)
            write_text(self.folder / PLAN, commented_yaml(self.plan))
        evaluate, tasks, every = None, list[Task](), max(self.plan.steps // _EVALUATIONS, 1)
        settings["checkpoint_every"] = min(every, _MAX_UNSAVED)
        if self.found.of("choose"):
            place = typed(task_of(self.folder, self.found, "val"))
            tasks = [load_task(place)]
            patience = _PATIENCE if len(self.found.of("choose")) >= _TELLING else 0
            settings |= {"tasks": (place,), "evaluate_every": every, "patience": patience}
            (task,) = tasks
            evaluate = lambda encoder: {task.name: primary_metric(score(encoder, task))}  # noqa: E731
        config = run_config(self.request, self.plan, steps=self.plan.steps, **settings)
        run_distillation(config, self.run, resume=True, reporter=self.reporter, evaluate=evaluate, tasks=tasks)

    def _run_settings(self) -> dict[str, Any]:
        table, views = Typed(str(self.folder / TRAIN)), self.plan.views
        taught = {"teacher": self.teacher, "store": Typed(str(self.folder / "store")) if views else None}
        text = {"text": typed(self.folder / "trimmed")}
        if self.found.kind != "images":
            return {"data": table, **taught, **text}
        labels = self.folder / "labels.txt"
        write_text(labels, "".join(f"{label}\n" for label in self.found.labels))
        return {"images": table, "texts": Typed(str(labels)), **taught, **text}

    def student(self) -> Path:
        """Return the folder of the student: the last, unless an earlier one was better by more than chance."""
        done = self._steps_done()
        last = last_evaluation(self.run, step=done)
        best = read_training_record(str(self.run / BEST_FOLDER)).get("steps")
        if last and best and best != done:
            (name, final), count = next(iter(last.items())), len(self.found.of("choose"))
            earlier = last_evaluation(self.run, step=best).get(name, 0.0)
            if earlier - final > 2 * max(final * (1 - final) / count, 1e-9) ** 0.5:
                return self.run / BEST_FOLDER
        return self.run / STUDENT_FOLDER

    def _steps_done(self) -> int:
        return int(read_training_record(str(self.run / STUDENT_FOLDER))["steps"])

    def export(self) -> None:
        """Export the student as a bundle, with its labels."""
        student = self.student()
        digest = sha256_of(student / WEIGHTS_FILE)
        if is_bundle(self.bundle) and read_manifest(self.bundle).provenance.get(_DIGEST) == digest:
            return self.reporter.note(f"{self.bundle} is there")
        request = Export(
            model=f"{LOCAL_DIR}{student}", output=self.bundle, target=self.request.target, force=True,
            labels=list(self.found.labels) or None, reporter=self.reporter,
        )  # fmt: skip
        enough = is_file(self.run / CALIBRATION_FILE)
        if not enough:
            self.reporter.note("too few images to calibrate INT8: the bundle is in float32")
            request = msgspec.structs.replace(request, precision="fp32")
        plans = [
            replace(plan, provenance={**plan.provenance, _DIGEST: digest}, fallback=_fallback(plan))
            for plan in plan_exports(request)
        ]
        pairs = kept_pairs(str(self.run)) if any(plan.precision == "int8" for plan in plans) else None
        written = export_model(request, plans, pairs, unseen=self._unseen_pairs())
        for trial in next(iter(written.values())).trials:
            self.reporter.note(f"{trial.tower} tower, {trial.name}: {trial.verdict}")

    def _unseen_pairs(self) -> Folder | None:
        """Return the pairs that answers are calibrated on: those to choose by, and where these are few, all held out.

        Calibration changes no top-1, which the report is of.
        """
        rows = {row.group: row for row in self.found.of("choose")}
        if len(rows) < MIN_PAIRS:
            rows |= {row.group: row for row in self.found.of("test")}
        if self.found.kind == "images":
            return None
        if len(rows) < MIN_PAIRS:
            self.reporter.note(
                f"{len(rows)} images are held out, and {MIN_PAIRS} are needed to calibrate probabilities and --none"
            )
            return None
        return Folder.of(HELD_OUT, [Path(row.path) for row in rows.values()], [(row.caption,) for row in rows.values()])

    def verify(self) -> None:
        """Verify that the bundle gives the exporter's answers, where this machine can run it."""
        checks = verify_bundle(self.bundle)
        failed = [check for check in checks if not check.passed]
        for check in failed:
            self.reporter.note(f"{check.what}: {check.detail}. {check.hint}")
        if not failed:
            self.reporter.note(f"{len(checks)} checks passed")
        if failed or not is_here(self.request.target):
            self.reporter.note(f"on the device, run: clip-rd-edge verify {as_word(self.bundle.name)}")

    def compare(self) -> None:
        """Measure teacher, student and all bundles, and write report and verdict."""
        suite, report = self._suite(), self.folder / "report"
        known = read_results(report / RESULTS) if is_file(report / RESULTS) else None
        bundles, kept = sorted(self.bundle.parent.glob("*/manifest.json")), self.folder / _KEPT
        key = " ".join(sha256_of(path) for path in (*bundles, self.student() / WEIGHTS_FILE))
        is_kept = is_file(kept) and kept.read_text(encoding="utf-8") == key
        is_right = is_kept and known is not None and known.suite == published(suite)
        if not (is_right and is_file(report / HTML) and is_file(self.folder / VERDICT)):
            results = run_suite(suite, self.open_encoder, self.reporter)
            limit = self.request.max_latency if is_here(self.request.target) else None
            label = suite.rows[-1].label
            lines = verdict(self.found, results, label, max_latency=limit)
            write_report(msgspec.structs.replace(results, verdict=tuple(lines)), report)
            write_text(self.folder / VERDICT, "".join(f"{line}\n\n" for line in lines))
            write_text(kept, key)

    def _suite(self) -> Suite:
        rows = [
            SuiteRow(label="Teacher", model=str(self.teacher), role="teacher"),
            SuiteRow(label="Student", model=str(self.student()), role="student"),
        ]
        bundles = sorted(path for path in self.bundle.parent.iterdir() if is_bundle(path) and path != self.bundle)
        for path in (*bundles, self.bundle):  # the one of this call last: the verdict is on it
            role: Role = "quantised" if "int8" in read_manifest(path).precision else "exported"
            rows.append(SuiteRow(label=f"Bundle {path.name}", model=str(path), role=role))
        tasks = (str(task_of(self.folder, self.found, "test")), *map(str, several(self.request.tasks)))
        return Suite(
            name=Path(self.request.data).resolve().name, rows=tuple(rows), tasks=tasks, rounds=100,
            budget_ms=None,
        )  # fmt: skip


def doubtful_labels(task: ZeroShotTask, predicted: Sequence[int], probabilities: Sequence[float]) -> tuple[str, ...]:
    """Return the images that are most surely of another class than their own, and that class."""
    surest = np.argsort(probabilities)[::-1].tolist()
    wrong = [i for i in surest if predicted[i] != task.targets[i] and probabilities[i] > _SURE]
    return tuple(
        f"{Path(str(task.images[i])).name} in {task.labels[task.targets[i]]} may be {task.labels[predicted[i]]}"
        for i in wrong[:_SHOWN_DOUBTS]
    )


def _fallback(plan: ExportPlan) -> Fallback | None:
    """Return the precision of towers that INT8 does not improve: whoever builds gets a bundle in any case."""
    floats = "fp32" in format_named(plan.format).precisions
    return "fp32" if plan.precision == "int8" and plan.format != "trt" and floats else plan.fallback


def _require_bundle_target(request: Build) -> None:
    plans = plan_exports(Export(model=f"{LOCAL_DIR}student", output=request.output, target=request.target))
    if len(plans) > 1 or plans[0].layout != "bundle":
        raise UsageError(
            f"The target is {request.target}; expected one that gets a bundle.",
            hint="build for one device after the other: the training is not repeated. A bundle becomes a page by "
            "clip-rd-edge export BUNDLE --target browser",
            option="target",
        )
