"""The public Python API: one function per command, re-exported by `clip_rd_edge`.

Heavy packages are imported on first use: PyTorch takes seconds to import and is not installed on devices.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from clip_rd_edge.errors import ClipRdEdgeError, UsageError
from clip_rd_edge.utils.paths import AnyPath, as_text
from clip_rd_edge.utils.reporting import SILENT, Reporter

if TYPE_CHECKING:
    import threading

    from typing_extensions import Unpack

    from clip_rd_edge.benchmarking.metrics import Score
    from clip_rd_edge.benchmarking.regression import Changes
    from clip_rd_edge.benchmarking.results import Results
    from clip_rd_edge.benchmarking.suite import RowRuntime
    from clip_rd_edge.contract.bundle import Manifest
    from clip_rd_edge.contract.encoder import TowerEncoder
    from clip_rd_edge.contract.images import ImageInput
    from clip_rd_edge.contract.task import Task
    from clip_rd_edge.convert.int8.select import Trial
    from clip_rd_edge.convert.options import ExportOptions
    from clip_rd_edge.convert.targets import Device
    from clip_rd_edge.distillation.average import AveragedModel
    from clip_rd_edge.distillation.config import DistillOptions, RunConfig
    from clip_rd_edge.distillation.probe import Probe
    from clip_rd_edge.evidence.results import Evidence
    from clip_rd_edge.runtime.doctor import Finding
    from clip_rd_edge.runtime.index import Hit
    from clip_rd_edge.runtime.index_update import Update
    from clip_rd_edge.runtime.label_list import Labels
    from clip_rd_edge.runtime.model import Model
    from clip_rd_edge.runtime.verify import Check


class QuickstartOptions(TypedDict, total=False):
    """Further options of `quickstart` and the command line.

    Keys:
        with_baseline: also train the same student without a teacher.
        student_steps, teacher_steps: training steps, of 32 and of 64 pairs. Default: 1,100 and 600.
        photos: a folder that benchmarks/scripts/tuxpaint.py wrote, on whose photographs the models are compared, too.
    """

    with_baseline: bool
    student_steps: int | None
    teacher_steps: int | None
    photos: AnyPath | None


class EmbedOptions(TypedDict, total=False):
    """The options of `embed` and the command line.

    Keys:
        student: a trained student to fine-tune with the embeddings; crops then have its input's shape. Default: square.
        precision: `fp32`, `bf16` or `fp16`. Default: `fp32`.

    All others are as for `distill`.
    """

    teacher_pretrained: str | None
    student: str | None
    precision: Literal["fp32", "bf16", "fp16"] | None
    images: AnyPath | None
    texts: AnyPath | None
    templates: str | Sequence[str]
    seed: int
    workers: int
    max_bad: float
    csv_img_key: str
    csv_caption_key: str
    json_caption_key: str | None
    train_data_upsampling_factors: str | None


class ServeOptions(TypedDict, total=False):
    """The options of `serve` and the command line.

    Keys:
        threads: threads of the model. Default: all cores.
        device: as for `load`.
        max_batch: max number of images or texts per call of a tower. Default: 16.
        max_items: max number of images and texts of requests that are not answered yet; what exceeds it is answered
            with 503 and Retry-After. Default: 1,024.
        allow_host: further host names by which clients reach the server, if there is no token.
    """

    threads: int | None
    device: str
    max_batch: int
    max_items: int
    allow_host: Sequence[str]


def load(
    model: AnyPath,
    *,
    pretrained: str | None = None,
    threads: int | None = None,
    runtime: RowRuntime | None = None,
    device: str = "auto",
) -> Model:
    """Open a model that classifies and embeds images (paths, PIL images, arrays, or lists of them) and texts.

    Args:
        model: the folder of a bundle, which needs no PyTorch; the folder of a run; or any open_clip model: an
            architecture with `pretrained`, `local-dir:PATH` or `hf-hub:ORG/REPO`.
        pretrained: an open_clip tag or a checkpoint file, if `model` is an architecture.
        threads: number of threads; None uses all cores.
        runtime: `onnxruntime`, `openvino`, `tensorrt`, `litert`, `executorch` or `coreml` for a bundle, None for the
            one it was exported for; `torch` or `torch-compile` for other models.
        device: the device on which ONNX Runtime runs a bundle; see `clip-rd-edge doctor`.

    Raises:
        InputError, ConfigError: the model does not exist or is damaged.
        UsageError: the runtime cannot run the model, or the device is not available.
        MissingExtraError: the model needs a package that is not installed.
    """
    from clip_rd_edge.runtime.model import Model

    return Model(open_encoder(os.fspath(model), pretrained=pretrained, threads=threads, runtime=runtime, device=device))


def distill(
    *,
    data: AnyPath | None = None,
    student: AnyPath,
    output: AnyPath,
    teacher: AnyPath | None = None,
    recipe: AnyPath = "clip-rd",
    resume: bool = False,
    reporter: Reporter = SILENT,
    **options: Unpack[DistillOptions],
) -> Path:
    """Train a compact student and return the run's folder. open_clip loads its `student/` as `local-dir:PATH`.

    Args:
        data: a CSV, TSV or Parquet table of images and captions, WebDataset shards, or `emoji`. None for runs on
            `images` and `texts` that do not belong together, which are among the other options.
        student: a preset, a timm architecture, or the folder of a run to continue training from.
        teacher: an open_clip name (with `teacher_pretrained`), `local-dir:PATH`, `hf-hub:ORG/REPO`, or None for recipes
            without a teacher.
        recipe: a name such as `clip-rd`, or a YAML file.
        resume: continue from the latest intact checkpoint in `output`.
        options: the other options of `clip-rd-edge distill`, under the same names.

    Raises:
        UsageError: `output` is in use, or an option is invalid.
        InputError, ConfigError: the data, teacher, student or recipe is missing or invalid.
        InterruptedRunError: a signal stopped the run; its state was saved.
    """
    from clip_rd_edge.distillation.config import resolve
    from clip_rd_edge.distillation.run import run_distillation
    from clip_rd_edge.utils.io import require_utf8_path

    accept_changes = options.pop("accept_changes", False)
    with _told_to_all_processes():
        config = resolve(recipe, data=data, student=student, teacher=teacher, **options)
        evaluate_student = _evaluator(config)
    run = Path(output)
    require_utf8_path(run)
    run_distillation(
        config,
        run,
        resume=resume,
        accept_changes=accept_changes,
        reporter=reporter,
        evaluate=evaluate_student,
    )
    return run


def embed(
    *,
    data: AnyPath | None = None,
    teacher: AnyPath,
    output: AnyPath,
    views: int = 1,
    recipe: AnyPath = "clip-rd",
    ray: str | None = None,
    reporter: Reporter = SILENT,
    **options: Unpack[EmbedOptions],
) -> Path:
    """Compute a teacher's embeddings for `distill(teacher_cache=output)`, and return the folder.

    What is there already is kept, so an interrupted call is continued by the same one. Processes that torchrun started
    share the work.

    Args:
        data, teacher: as for `distill`.
        views: number of fixed crops per image.
        recipe: its range of crops is used.
        ray: address of a Ray cluster that does the work (`auto`, HOST:PORT), with a worker per GPU or machine. Its
            machines need the same data and teacher, but not the output.
        options: the other options of `clip-rd-edge embed`, under the same names; those of `distill` must be the same.

    Raises:
        UsageError: `output` holds something else, or there is no cluster.
        InputError, ConfigError: the data, teacher or recipe is missing or invalid.
    """
    from clip_rd_edge.distillation.config import resolve
    from clip_rd_edge.distillation.store.embed import embed_teacher

    folder = Path(output)
    told: dict[str, Any] = {**options, "views": views}
    told["precision"] = told.get("precision") or "fp32"
    told["student"] = told.get("student") or "resnet18"
    with _told_to_all_processes():
        config = resolve(recipe, data=data, teacher=teacher, **told)
    embed_teacher(config, folder, cluster=ray, reporter=reporter)
    return folder


def recipe(name: str | None = None) -> str:
    """Return a recipe as commented YAML, to start one's own from; without a name, a list of the shipped recipes.

    Args:
        name: a name such as `clip-rd`, or a YAML file.

    Raises:
        ConfigError: there is no such recipe, or it is invalid.
    """
    from clip_rd_edge.distillation.config import commented_recipe, describe_recipes

    return describe_recipes() if name is None else commented_recipe(name)


def stitch(
    classifier: str,
    output: AnyPath,
    *,
    names: AnyPath,
    text: str,
    pretrained: AnyPath | None = None,
    image_size: int | None = None,
    context_length: int = 77,
    force: bool = False,
) -> Path:
    """Join an image classifier and a sentence encoder to an open_clip model, and return its folder.

    No image is needed: the projection is computed from the classifier's weights and the embeddings of its class names.
    open_clip loads the folder as `local-dir:PATH`, and `distill` takes it as a teacher. Its bundles start with the
    classes as labels; with `imagenet`, with the labels `everyday`.

    Args:
        classifier: a timm architecture (`resnet18`, `resnet18.tv_in1k`), or `torchvision:NAME`.
        names: a text file with one class per line, in the order of the classifier's outputs, where `;` separates
            synonyms and descriptions; or `imagenet` for its 1,000 classes.
        text: `all-MiniLM-L6-v2`, a folder or zip archive in the layout of transformers, a name on the Hugging Face hub,
            or an open_clip model as `local-dir:PATH`, whose text tower is used.
        pretrained: a file of the classifier's weights (.safetensors, .pth); None loads those of an installed package
            for `tf_efficientnet_lite0`, else those that timm or torchvision publishes.
        image_size: edge of the input images in pixels; None uses the classifier's own.
        context_length: tokens per text, at most as many as the sentence encoder supports.
        force: replace an existing `output`.

    Raises:
        UsageError: `output` is in use.
        InputError: the classifier, its weights, the names or the sentence encoder do not exist.
        ConfigError: the weights do not match the classifier, the number of names is not that of its classes, or
            open_clip cannot hold one of the two models.
    """
    from clip_rd_edge.utils.io import require_free_output, require_utf8_path

    folder = Path(output)
    require_utf8_path(folder)
    require_free_output(folder, overwrite=force)

    from clip_rd_edge.models.classifier import load_classifier
    from clip_rd_edge.models.load import save_clip
    from clip_rd_edge.models.sentences import load_sentence_encoder
    from clip_rd_edge.models.stitch import IMAGENET, read_class_names, stitch_clip
    from clip_rd_edge.runtime.label_list import everyday_labels

    class_names = read_class_names(names)
    image = load_classifier(classifier, pretrained=None if pretrained is None else os.fspath(pretrained))
    sentences = load_sentence_encoder(text, context_length=context_length)
    clip = stitch_clip(image, sentences, class_names, image_size=image_size)
    if os.fspath(names) == IMAGENET:  # a camera sees few of its 118 breeds of dogs
        clip = replace(clip, labels=tuple(everyday_labels()))
    provenance = {"classifier": classifier, "image_weights": image.source, "text_weights": sentences.source}
    save_clip(folder, clip, provenance=provenance)
    return folder


def probe_teachers(
    teachers: Sequence[AnyPath],
    *,
    data: AnyPath | None = None,
    student: AnyPath,
    output: AnyPath,
    recipe: AnyPath = "clip-rd",
    reporter: Reporter = SILENT,
    **options: Unpack[DistillOptions],
) -> Probe:
    """Train a student from each of several teachers for a few steps, and rank the teachers by what it learned.

    The largest teacher is often not the best: a small student learns little from one that is far above it. All runs
    have the same seed, and so the same batches. Short runs rank by what is learned first.

    Args:
        teachers: each an ARCHITECTURE@TAG, `local-dir:PATH`, `hf-hub:ORG/REPO` or the folder of a run.
        data, student, recipe: as for `distill`.
        output: a folder for the runs and probe.json; the same call continues an interrupted one.
        options: as for `distill`, with `tasks`, by whose mean accuracy the teachers are ranked, and `steps`, 200 by
            default.

    Raises:
        UsageError: there is no task, a teacher is named twice, `output` has other runs, or an option is invalid.
        InputError, ConfigError: a teacher, the data, the student or the recipe is missing or invalid.
        InterruptedRunError: a signal stopped the runs; their state was saved.
    """
    from clip_rd_edge.distillation.config import resolve
    from clip_rd_edge.distillation.probe import DEFAULT_STEPS, probe_teachers
    from clip_rd_edge.utils.io import require_utf8_path

    require_utf8_path(Path(output))
    if not options.get("epochs") and not options.get("steps"):
        options["steps"] = DEFAULT_STEPS
    config = resolve(recipe, data=data, student=student, **options)
    tasks = load_tasks(config.tasks) if config.tasks else []
    return probe_teachers([os.fspath(name) for name in teachers], Path(output), config, tasks, reporter=reporter)


def average(
    first: AnyPath,
    second: AnyPath,
    output: AnyPath,
    *,
    weight: float | Literal["best"] = 0.5,
    tasks: str | Task | Sequence[str | Task] = (),
    templates: str | Sequence[str] | None = None,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> AveragedModel:
    """Average the weights of two models of one architecture: (1 − weight) · first + weight · second.

    A fine-tuned model has forgotten some of what its start knew; between the two there are models that are nearly as
    good at both (WiSE-FT, Wortsman et al. 2022). open_clip loads the result as `local-dir:PATH`.

    Args:
        first, second: runs' folders, `local-dir:PATH` or `hf-hub:ORG/REPO`.
        weight: share of the second, from 0 to 1; or `best`, that of the highest mean accuracy on the tasks.
        tasks: measure the models between the two on these at every tenth; see the result's `curve`, and average.png in
            the output.
        templates: as for `evaluate`.
        force: replace an existing `output`.

    Raises:
        UsageError: `output` is in use or holds one of the two models, or the best weight has no task to be measured on.
        ConfigError: the models differ in more than their weights, or the weight is not between 0 and 1.
        InputError: a model or a task does not exist.
    """
    loaded = (
        load_tasks(tasks, templates=templates) if tasks else []
    )  # before the models: a mistyped name is said at once

    from clip_rd_edge.distillation.average import average_models

    return average_models(
        (os.fspath(first), os.fspath(second)),
        Path(output),
        weight=weight,
        tasks=loaded,
        force=force,
        reporter=reporter,
    )


@dataclass(frozen=True)
class ExportedBundle(os.PathLike[str]):
    """An exported bundle. It is path-like: pass it wherever the path of a bundle is expected.

    Attributes:
        folder: the bundle's folder.
        manifest: the bundle's manifest.
        trials: the measured INT8 candidates, with a verdict on each.
        targets: if several targets were requested, the bundle of each, in a folder of its name in `folder`; the other
            attributes are then those of the first.
    """

    folder: Path
    manifest: Manifest
    trials: tuple[Trial, ...] = ()
    targets: tuple[ExportedBundle, ...] = ()

    def __fspath__(self) -> str:
        return str(self.folder)


def export(
    model: AnyPath,
    output: AnyPath,
    *,
    pretrained: str | None = None,
    force: bool = False,
    reporter: Reporter = SILENT,
    **options: Unpack[ExportOptions],
) -> ExportedBundle:
    """Export a model as a bundle for a device: two ONNX files, a tokenizer and a manifest.

    For several targets, `output` holds one bundle per target, in a folder of its name.

    Args:
        model: as for `load`, except that a bundle is accepted only with `target="browser"`.
        force: replace an existing `output`.
        options: the other options of `clip-rd-edge export`, under the same names.

    Raises:
        UsageError: `output` is in use, or the options contradict each other.
        InputError, ConfigError: the model, target, labels or calibration pairs are missing or invalid.
        MissingExtraError: a required package is not installed.
        ClipRdEdgeError: a tower cannot be exported, or no tower is worth shipping in INT8.
    """
    import msgspec

    from clip_rd_edge.contract.bundle import is_bundle
    from clip_rd_edge.convert.calibration import calibration_pairs
    from clip_rd_edge.convert.targets import BROWSER, plan_exports
    from clip_rd_edge.utils.io import require_free_output

    spec, output = os.fspath(model), Path(output)
    require_free_output(output, overwrite=force)
    plans = plan_exports(options)
    plan = plans[0]
    node_modules = options.get("node_modules")
    results = _report(options.get("report"))
    bundle = Path(spec) if is_bundle(Path(spec)) else None
    if bundle and options.get("target") != BROWSER:
        raise UsageError(f"{spec} is already a bundle.", hint="pass the model that it was exported from")
    if plan.layout == BROWSER:
        from clip_rd_edge.web.browser import find_packages, write_from_bundle

        reporter.update("looking for onnxruntime-web")
        find_packages(Path(node_modules) if node_modules else None)
        if bundle:
            bundled = {**options, "labels": plan.request.labels}
            return ExportedBundle(output, write_from_bundle(bundle, output, bundled, pretrained, overwrite=force))
    needs_pairs = any(plan.request.precision == "int8" for plan in plans)
    pairs = calibration_pairs(as_text(options.get("calibration")), spec) if needs_pairs else None
    if plan.note:
        reporter.say(plan.note)

    # PyTorch takes seconds to import: by now, mistakes in the options have been reported.
    from clip_rd_edge.convert.calibration import calibration_set
    from clip_rd_edge.exporters.bundle import export_bundle, export_bundles, package_versions
    from clip_rd_edge.models.encoder import TorchEncoder
    from clip_rd_edge.models.load import load_clip

    reporter.update("loading the model")
    clip = load_clip(spec, pretrained=pretrained)
    if plan.layout == "immich":
        from clip_rd_edge.convert.immich import immich_name, where_it_goes, write_immich

        name = immich_name(options.get("as_name"), embedding_size=clip.embedding_size, model=clip.name)
    calibration = None
    if pairs is not None:
        reporter.update(f"reading images of {pairs.name}")
        calibration = calibration_set(pairs, preprocessing=clip.preprocessing, tokenize=TorchEncoder(clip).tokenize)
    provenance = {"model": spec, "pretrained": pretrained, **package_versions()}
    requests = {}
    for planned in plans:
        recorded = {key: value for key, value in {**provenance, "device": planned.device}.items() if value}
        labels = planned.request.labels or (clip.labels if plan.layout in ("bundle", BROWSER) else ()) or None
        requests[planned.device] = msgspec.structs.replace(planned.request, provenance=recorded, labels=labels)
    if len(plans) > 1:
        bundles = export_bundles(clip, output, requests, calibration=calibration, overwrite=force, reporter=reporter)
        exported = [ExportedBundle(output / name, part.manifest, part.trials) for name, part in bundles.items()]
        return ExportedBundle(output, exported[0].manifest, exported[0].trials, tuple(exported))
    request = requests[plan.device]
    if plan.layout == "huggingface":
        from clip_rd_edge.exporters.huggingface import export_huggingface
        from clip_rd_edge.models.load import training_facts

        converted = export_huggingface(
            clip,
            output,
            request,
            calibration=calibration,
            results=results,
            training=training_facts(spec),
            overwrite=force,
            reporter=reporter,
        )
        return ExportedBundle(output, converted.manifest, converted.trials)
    with tempfile.TemporaryDirectory() as scratch:
        folder = output if plan.layout == "bundle" else Path(scratch)
        converted = export_bundle(
            clip, folder, request, calibration=calibration, overwrite=force or folder != output, reporter=reporter
        )
        if plan.layout == "immich":
            write_immich(folder, output, overwrite=force)
            reporter.say(where_it_goes(output, name))
        elif plan.layout == BROWSER:
            from clip_rd_edge.web.browser import write_browser

            write_browser(folder, output, node_modules=Path(node_modules) if node_modules else None, overwrite=force)
    return ExportedBundle(output, converted.manifest, converted.trials)


def _report(folder: AnyPath | None) -> Results | None:
    from clip_rd_edge.benchmarking.results import read_results

    return None if folder is None else read_results(Path(folder))


def push(
    folder: AnyPath, repo: str, *, private: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Upload a model's folder as one commit to a repository of the Hugging Face hub, and return its address.

    Args:
        folder: an export with `layout="huggingface"`, a student, the folder of a run, or a bundle.
        repo: `ORG/NAME`; it is created if it does not exist.
        private: create the repository as private; one that exists stays as it is.
        revision: the branch; None is the main one.
        message: of the commit.

    Raises:
        InputError: the folder holds no model.
        UsageError: the name is invalid, or there is no token that may write there.
        UnreachableError: the hub cannot be reached.
    """
    from clip_rd_edge.models.push import push_folder

    return push_folder(Path(folder), repo, private=private, revision=revision, message=message)


def evaluate(
    model: AnyPath | Model,
    tasks: AnyPath | Task | Sequence[AnyPath | Task],
    *,
    pretrained: str | None = None,
    threads: int | None = None,
    templates: str | Sequence[str] | None = None,
    per_class: bool = False,
    reporter: Reporter = SILENT,
) -> list[Score]:
    """Evaluate a bundle, a run or any open_clip model on zero-shot classification and retrieval; one score per task.

    Args:
        model: a loaded model, or anything that `load` accepts together with `pretrained` and `threads`.
        tasks: names as for `clip-rd-edge evaluate --task`, or task objects.
        templates: prompt templates with one `{}` for zero-shot tasks, a file of them, or `imagenet` for CLIP's 80; None
            uses each data set's own, or else CLIP's.
        per_class: fill in `per_class` of zero-shot scores: the accuracy of each class, and what it was mistaken for.
    """
    from clip_rd_edge.benchmarking.accuracy import evaluate as score
    from clip_rd_edge.runtime.model import Model

    loaded = load_tasks(tasks, templates=templates)
    evaluated = model if isinstance(model, Model) else load(model, pretrained=pretrained, threads=threads)
    return [score(evaluated.encoder, task, per_class=per_class, reporter=reporter) for task in loaded]


def benchmark(
    suite: AnyPath,
    output: AnyPath,
    *,
    root: str | None = None,
    models: str | Sequence[str] = (),
    budget_ms: float | None = None,
    min_accuracy: float | None = None,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Results:
    """Measure accuracy, latency and size of the models of a suite, and write a report into `output`.

    Accuracies are saved in `output` as they are measured: after an interruption, the same call resumes from there.

    Args:
        suite: a YAML file, or the name of a suite that ships with the package.
        root: folder of the data sets; None uses the suite's.
        models: `ROLE=MODEL` entries that override the suite's models.
        budget_ms, min_accuracy: max latency and min accuracy of a recommended model.
        force: write into `output` even if it is not empty.
    """
    import msgspec

    from clip_rd_edge.benchmarking.answer_cache import FOLDER, AnswerCache
    from clip_rd_edge.benchmarking.report.plot import require_matplotlib
    from clip_rd_edge.benchmarking.report.text import write_report
    from clip_rd_edge.benchmarking.results import this_environment
    from clip_rd_edge.benchmarking.run import run_suite
    from clip_rd_edge.benchmarking.suite import find_suite, parse_models, read_suite
    from clip_rd_edge.contract.encoder import as_list
    from clip_rd_edge.utils.io import require_free_output
    from clip_rd_edge.utils.lock import LOCK_FILE, exclusive_writer
    from clip_rd_edge.utils.paths import is_folder

    folder = Path(output)
    # Check everything that can be checked before the long work starts.
    interrupted = is_folder(folder / FOLDER)
    require_free_output(folder, overwrite=force or interrupted, ignoring=(LOCK_FILE,))
    require_matplotlib()
    loaded = read_suite(find_suite(os.fspath(suite)), rows=parse_models(as_list(models)), data_root=root)
    budget = {"budget_ms": budget_ms, "min_accuracy": min_accuracy}
    loaded = msgspec.structs.replace(loaded, **{name: value for name, value in budget.items() if value is not None})
    if models:
        for row in loaded.rows:
            loaded.resolve_model(row)  # models named in this call must exist: they are not skipped
    with exclusive_writer(folder):
        if interrupted:
            reporter.say(f"resuming from the results in {folder / FOLDER}")
        cache = AnswerCache(folder / FOLDER, this_environment())
        open_model = partial(open_encoder, threads=loaded.threads)
        results = run_suite(loaded, open_model, reporter, cache=cache, launch=first_answer)
        write_report(results, folder)
        cache.remove()
    return results


def compare(old: AnyPath, new: AnyPath) -> Changes:
    """Compare two benchmark results, files or folders: regressions, improvements and noise."""
    from clip_rd_edge.benchmarking.regression import compare_runs
    from clip_rd_edge.benchmarking.results import read_results

    return compare_runs(read_results(Path(old)), read_results(Path(new)))


def recommend(results: AnyPath, *, budget_ms: float | None = None, min_accuracy: float | None = None) -> str:
    """Return a sentence that recommends a model of a finished benchmark; nothing is measured.

    Args:
        results: a results.json or the folder of one.
        budget_ms, min_accuracy: max latency from image file to answer (95th percentile) and min top-1 as a fraction;
            None keeps what the benchmark was run with.

    Raises:
        UsageError: there is neither a requirement nor a zero-shot task to choose by.
    """
    import msgspec

    from clip_rd_edge.benchmarking.report.findings import recommendation
    from clip_rd_edge.benchmarking.results import read_results

    read = read_results(Path(results))
    given = {"budget_ms": budget_ms, "min_accuracy": min_accuracy}
    suite = msgspec.structs.replace(read.suite, **{name: value for name, value in given.items() if value is not None})
    advice = recommendation(msgspec.structs.replace(read, suite=suite))
    if advice is None:
        raise UsageError(
            f"{results} has nothing to choose a model by: no requirement, or no zero-shot task.",
            hint="give a requirement, such as --budget-ms 10",
        )
    return advice.replace("**", "")


def spread(results: AnyPath | Sequence[AnyPath]) -> str:
    """Return means and standard deviations over several results of one suite, such as seeds, as a Markdown table.

    Args:
        results: at least two, each a results.json or the folder of one.
    """
    from clip_rd_edge.benchmarking.results import read_results
    from clip_rd_edge.benchmarking.statistics import seeds_table

    paths = [results] if isinstance(results, str | os.PathLike) else results
    return seeds_table([read_results(Path(path)) for path in paths])


def quickstart(
    output: AnyPath = "quickstart",
    *,
    student: str = "resnet10t",
    recipe: str = "clip-rd",
    seed: int = 0,
    reporter: Reporter = SILENT,
    **options: Unpack[QuickstartOptions],
) -> Results:
    """Run the whole pipeline on the built-in emoji data set in minutes on a CPU; an interrupted run is resumed.

    Args:
        student: a preset or a timm architecture.
        seed: random seed of the student.
        options: the other options of `clip-rd-edge quickstart`, under the same names.
    """
    from clip_rd_edge.utils.io import require_utf8_path

    require_utf8_path(Path(output))

    from clip_rd_edge.walkthrough.pipeline import Settings, run_quickstart

    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if "photos" in given:
        given["photos"] = Path(given["photos"])
    settings = Settings(folder=Path(output), student=student, recipe=recipe, seed=seed, **given)
    return run_quickstart(settings, reporter, partial(open_encoder, threads=1), first_answer)


def evidence_run(
    suite: AnyPath, output: AnyPath, *, teacher: str | None = None, reporter: Reporter = SILENT
) -> Evidence:
    """Train a suite's students with each method and seed, measure them, and write tables and figures.

    Args:
        suite: a YAML file, or the name of a suite that ships with the package.
        teacher: as for `distill`; None fine-tunes the built-in teacher first.
    """
    from clip_rd_edge.benchmarking.report.plot import require_matplotlib
    from clip_rd_edge.evidence.report import write_report
    from clip_rd_edge.evidence.run import run_evidence
    from clip_rd_edge.evidence.suite import read_evidence
    from clip_rd_edge.utils.io import require_utf8_path

    require_utf8_path(Path(output))
    require_matplotlib()
    evidence = run_evidence(read_evidence(os.fspath(suite)), Path(output), reporter, teacher=teacher)
    for path in write_report(evidence, Path(output)):
        reporter.say(f"written: {path}")
    return evidence


def evidence_report(results: AnyPath, *, into: AnyPath | None = None) -> str:
    """Return the tables of an evidence file as Markdown. Nothing is trained.

    Args:
        into: a Markdown file whose marked lines are replaced by the tables; figures are written beside `results`.
    """
    from clip_rd_edge.evidence.report import markdown, publish, read_evidence_file

    if into is not None:
        publish(Path(results), Path(into))
    return markdown(read_evidence_file(Path(results)))


def verify(bundle: AnyPath, *, threads: int | None = None, device: str = "auto") -> list[Check]:
    """Check a bundle's files, run both towers, and compare their answers with the exporter's, without PyTorch.

    Args:
        device: as for `load`. A tower that does not run there fails its check.
    """
    from clip_rd_edge.runtime.verify import verify_bundle

    return verify_bundle(Path(bundle), threads=threads, device=device)


def index(
    bundle: AnyPath,
    folder: AnyPath,
    output: AnyPath,
    *,
    threads: int | None = None,
    device: str = "auto",
    ray: str | None = None,
    reporter: Reporter = SILENT,
) -> Update:
    """Build or update a search index of the images under a folder; only new and changed images are embedded.

    Args:
        ray: address of a Ray cluster that embeds them (`auto`, HOST:PORT); its machines need the same bundle and
            images.
    """
    from clip_rd_edge.runtime.index_update import update_index
    from clip_rd_edge.runtime.load import load as load_bundle

    encoder = load_bundle(Path(bundle), threads=threads, device=device, spin=False)
    return update_index(encoder, Path(folder), Path(output), cluster=ray, reporter=reporter)


def watch_index(
    bundle: AnyPath,
    folder: AnyPath,
    output: AnyPath,
    *,
    threads: int | None = None,
    device: str = "auto",
    stop: threading.Event | None = None,
    reporter: Reporter = SILENT,
) -> Iterator[Update]:
    """Build or update a search index as `index` does, and keep it up to date while images come, change and go.

    Args:
        stop: ends the watch when it is set, with everything saved that is embedded; None watches for ever.

    Yields:
        What each update has done.
    """
    from clip_rd_edge.runtime.index_watch import watch_index as watch
    from clip_rd_edge.runtime.load import load as load_bundle

    encoder = load_bundle(Path(bundle), threads=threads, device=device, spin=False)
    return watch(encoder, Path(folder), Path(output), stop=stop, reporter=reporter)


def search(
    index: AnyPath,
    query: str | ImageInput,
    *,
    top: int = 10,
    bundle: AnyPath | None = None,
    folder: AnyPath | None = None,
    exact: bool = False,
    threads: int | None = None,
    device: str = "auto",
) -> list[Hit]:
    """Return the images of an index that are nearest to a text or an image, nearest first.

    Args:
        query: a text, the path of an image file, a PIL image or an array.
        bundle: current path of the bundle that built the index, if it was moved.
        folder: current path of the image folder, if it was moved.
        exact: compare all images, even if the index has a graph for approximate search.
    """
    from clip_rd_edge.runtime.index import search_index

    return search_index(
        Path(index), query, top=top, bundle=bundle, folder=folder, exact=exact, threads=threads, device=device
    )


def demo(
    bundles: AnyPath | Sequence[AnyPath],
    *,
    labels: Labels = None,
    host: str = "127.0.0.1",
    port: int = 8765,
    threads: int | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a local web page to try bundles with a camera or image files, until Ctrl-C.

    Args:
        labels: initial labels of the page; None uses the bundle's own.
        ready: called with the page's URL once the server accepts connections.
    """
    from clip_rd_edge.runtime.label_list import label_names
    from clip_rd_edge.web.app import Demo, serve

    paths = [bundles] if isinstance(bundles, str | os.PathLike) else bundles
    serve(
        Demo([Path(path) for path in paths], labels=label_names(labels), threads=threads),
        host=host,
        port=port,
        ready=ready,
    )


def watch(
    run: AnyPath,
    output: AnyPath | None = None,
    *,
    task: str | None = None,
    answers: bool = True,
    threads: int = 1,
    host: str = "127.0.0.1",
    port: int = 8767,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a page that shows how a run goes, until Ctrl-C; the run needs no option for it.

    Args:
        run: the folder that `distill` writes to.
        output: write the page as it is now into this file, and serve nothing.
        task: whose images the student is asked about; None takes the run's first task, else its training pairs.
        answers: compute what the student of the newest checkpoint answers; without PyTorch, the page says what to
            install.
        threads: for the answers.
        ready: called with the page's URL once the server accepts connections.

    Raises:
        InputError: the folder is not that of a run, or there is no such task.
        UsageError: listening on the address failed.
    """
    from clip_rd_edge.installation import install_command
    from clip_rd_edge.utils.io import write_text
    from clip_rd_edge.web.watch.page import render
    from clip_rd_edge.web.watch.state import Answers, read_run

    folder = Path(run)
    state = read_run(folder)
    if task is not None:
        load_tasks([task])
    now: Callable[[], Answers] = Answers
    in_background: Callable[[], Answers] = Answers
    if answers:
        try:
            from clip_rd_edge.distillation.monitoring.answers import StudentAnswers
        except ModuleNotFoundError:
            missing = Answers(problem=f"Sample answers need PyTorch: {install_command('train')}")
            now = in_background = lambda: missing
        else:
            in_background = StudentAnswers(folder, task=task, threads=threads)
            now = in_background.compute
    if output is not None:
        write_text(Path(output), render(state, now(), served=False))
        return
    from clip_rd_edge.web.watch.app import serve

    serve(folder, in_background, host=host, port=port, ready=ready)


def serve(
    bundle: AnyPath,
    index: AnyPath | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8766,
    token: str = "",
    ready: Callable[[str], None] = lambda url: None,
    **options: Unpack[ServeOptions],
) -> None:
    """Serve a bundle to other programs over HTTP until SIGINT or SIGTERM: embeddings, classification and search.

    Args:
        index: an index that the bundle created, for /search.
        token: the bearer token that requests need; empty for none.
        ready: called with the server's URL once it accepts connections.
        options: the other options of `clip-rd-edge serve`, under the same names.

    Raises:
        InputError: there is no bundle or index, or another bundle created the index.
        UsageError: listening on the address failed.
    """
    from clip_rd_edge import __version__
    from clip_rd_edge.runtime.load import load as load_bundle

    try:
        from clip_rd_edge.serving.app import Limits, Service, make_app
        from clip_rd_edge.web.app import is_loopback, run_server
    except ModuleNotFoundError as error:
        from clip_rd_edge.errors import MissingExtraError

        raise MissingExtraError(error.name or "starlette", extra="serve", purpose="Serving a bundle") from error
    encoder = load_bundle(
        Path(bundle), threads=options.get("threads"), device=options.get("device", "auto"), spin=False
    )
    sizes = {name: options[name] for name in ("max_batch", "max_items") if name in options}
    folder = None if index is None else Path(index)
    service = Service(encoder, index=folder, limits=Limits(**sizes), version=__version__)
    app = make_app(service, token=token, loopback=is_loopback(host), names=options.get("allow_host", ()))
    run_server(app, host=host, port=port, ready=ready, stop_within_s=10)


def devices(name: str | None = None) -> dict[str, Device]:
    """Return the supported devices by name: their requirements, how to export for them, and what was tested."""
    from clip_rd_edge.convert.targets import device_names, read_device

    names = [name] if name else device_names()
    return {device: read_device(device) for device in names}


def doctor() -> list[Finding]:
    """Report which runtimes this machine supports, what is missing, and the command that installs it."""
    from clip_rd_edge.runtime.doctor import examine

    return examine()


def open_encoder(
    spec: str,
    *,
    pretrained: str | None = None,
    threads: int | None = None,
    runtime: RowRuntime | None = None,
    device: str = "auto",
) -> TowerEncoder:
    """Open a bundle without PyTorch, or another model with it; arguments and errors as for `load`."""
    from clip_rd_edge.contract.bundle import is_bundle
    from clip_rd_edge.contract.checkpoint import model_folder

    path = Path(spec.removeprefix("local-dir:"))
    if is_bundle(path):
        if runtime == "torch" or runtime == "torch-compile":
            raise UsageError(f"{spec} is a bundle, which torch cannot run.", hint="pass the model it was exported from")
        from clip_rd_edge.runtime.load import load as load_bundle

        return load_bundle(path, threads=threads, runtime=runtime, device=device)
    if runtime not in (None, "torch", "torch-compile"):
        raise UsageError(f"{spec} is not a bundle: {runtime} cannot run it.", hint="export it with clip-rd-edge export")
    import torch

    from clip_rd_edge.models.encoder import CompiledEncoder, TorchEncoder
    from clip_rd_edge.models.load import load_clip

    if threads is not None:
        torch.set_num_threads(threads)
    kind = CompiledEncoder if runtime == "torch-compile" else TorchEncoder
    return kind(load_clip(spec, pretrained=pretrained), folder=model_folder(spec))


def load_tasks(
    tasks: AnyPath | Task | Sequence[AnyPath | Task], *, templates: str | Sequence[str] | None = None
) -> list[Task]:
    """Load tasks by name; arguments as for `evaluate`."""
    import msgspec

    from clip_rd_edge.contract.encoder import as_list
    from clip_rd_edge.contract.task import ZeroShotTask, with_distinct_names
    from clip_rd_edge.contract.templates import parse_templates
    from clip_rd_edge.data.tasks import load_task

    given = [tasks] if isinstance(tasks, str) or not isinstance(tasks, Sequence) else tasks
    names: list[str | Task] = [as_text(name) for name in given]
    unique = [name for i, name in enumerate(names) if name not in names[:i]]
    loaded = [load_task(name) if isinstance(name, str) else name for name in unique]
    if templates:
        chosen = parse_templates(as_list(templates))
        loaded = [
            msgspec.structs.replace(task, templates=chosen.prompts, templates_from=chosen.origin)
            if isinstance(task, ZeroShotTask)
            else task
            for task in loaded
        ]
    return with_distinct_names(loaded, [name if isinstance(name, str) else name.name for name in unique])


def first_answer(spec: str, runtime: RowRuntime | None, threads: int) -> list[str]:
    """Return the command of a process that classifies one image, to time a cold start; append the image's path."""
    return [sys.executable, "-m", "clip_rd_edge.cli._first_answer", spec, runtime or "", str(threads)]


@contextmanager
def _told_to_all_processes() -> Iterator[None]:
    """Within the block, an error also ends the other processes of the run, which would wait for this one to join."""
    try:
        yield
    except (ClipRdEdgeError, ModuleNotFoundError) as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from clip_rd_edge.distillation.processes.distributed import tell_failure

            tell_failure(error if isinstance(error, ClipRdEdgeError) else UsageError(f"{error}."))
        raise


def _evaluator(config: RunConfig) -> Callable[[Any], dict[str, float]] | None:
    """Return a function that scores the student on each of the run's tasks by top-1 accuracy or R@1, or None."""
    if not config.tasks:
        return None
    from clip_rd_edge.benchmarking.accuracy import evaluate as score
    from clip_rd_edge.benchmarking.metrics import primary_metric

    tasks = load_tasks(config.tasks)
    return lambda encoder: {task.name: primary_metric(score(encoder, task)) for task in tasks}
