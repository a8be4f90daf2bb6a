"""What stands behind the front door, `clip_rd_edge.load` and its neighbours: one function per command.

Nothing heavy is imported before it is needed: PyTorch takes seconds, and a device has none.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils.reporting import SILENT, Reporter

if TYPE_CHECKING:
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
    from clip_rd_edge.data.clip_benchmark import Templates
    from clip_rd_edge.distillation.config import DistillOptions, RunConfig
    from clip_rd_edge.evidence.results import Evidence
    from clip_rd_edge.runtime.doctor import Finding
    from clip_rd_edge.runtime.index import Hit, Update
    from clip_rd_edge.runtime.model import Model
    from clip_rd_edge.runtime.verify import Check

AnyPath = str | os.PathLike[str]


def load(
    model: AnyPath,
    *,
    pretrained: str | None = None,
    threads: int | None = None,
    runtime: RowRuntime | None = None,
    device: str = "auto",
) -> Model:
    """Open a model: it classifies and embeds paths, PIL images, arrays, and lists of them.

    Args:
        model: a bundle's folder, which needs no PyTorch; a run's folder; or what open_clip loads: an architecture
            with `pretrained`, `local-dir:PATH`, `hf-hub:ORG/REPO`.
        pretrained: open_clip's tag or a checkpoint file, where `model` is an architecture.
        threads: threads to run on; None takes every core.
        runtime: for a bundle `onnxruntime`, `openvino` or `tensorrt`, None for what it was exported for; for a model
            `torch` or `torch-compile`.
        device: what ONNX Runtime computes a bundle on; see `clip-rd-edge doctor`.

    Raises:
        InputError, ConfigError: there is no such model, or it is damaged.
        UsageError: the runtime does not run it, or the device is not here.
        MissingExtraError: the model needs a package that is not installed.
    """
    from clip_rd_edge.runtime.model import Model

    return Model(open_encoder(os.fspath(model), pretrained=pretrained, threads=threads, runtime=runtime, device=device))


def distill(
    *,
    data: str,
    student: str,
    output: AnyPath,
    teacher: str | None = None,
    recipe: str = "clip-rd",
    resume: bool = False,
    reporter: Reporter = SILENT,
    **options: Unpack[DistillOptions],
) -> Path:
    """Train a compact student; returns the run's folder, whose `student/` open_clip loads as `local-dir:`.

    Args:
        data: a CSV or TSV of images and captions, WebDataset shards, or `emoji`.
        student: a preset, a timm architecture, or a run's folder to go on from.
        teacher: an open_clip name (with `teacher_pretrained`), `local-dir:PATH`, `hf-hub:ORG/REPO`, or None for recipes
            that need none.
        recipe: a name such as `clip-rd`, or a YAML file.
        resume: continue from the newest checkpoint in `output`.
        options: the other options of `clip-rd-edge distill`, by the same names.

    Raises:
        UsageError: `output` is in use, or an option does not fit.
        InputError, ConfigError: data, teacher, student or recipe do not fit.
        InterruptedRunError: a signal asked to stop; the state was saved.
    """
    from clip_rd_edge.distillation.config import resolve
    from clip_rd_edge.distillation.run import run_distillation

    config = resolve(recipe, data=data, student=student, teacher=teacher, **options)
    run = Path(output)
    run_distillation(config, run, resume=resume, reporter=reporter, evaluate=_evaluator(config))
    return run


@dataclass(frozen=True)
class ExportedBundle(os.PathLike[str]):
    """A bundle that was written; wherever a bundle's path is expected, this may be given.

    Attributes:
        folder: where it is.
        manifest: what it says of itself.
        trials: the INT8 candidates that were measured, and which of them was shipped.
    """

    folder: Path
    manifest: Manifest
    trials: tuple[Trial, ...] = ()

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

    Args:
        model: as `load` takes it, but no bundle; for `target="browser"` it may be one.
        force: replace what stands at `output`.
        options: the other options of `clip-rd-edge export`, by the same names.

    Raises:
        UsageError: `output` is in use, or options do not go together.
        InputError, ConfigError: the model, the target, the labels or the calibration pairs do not fit.
        MissingExtraError: a package is needed that is not installed.
        ClipRdEdgeError: a tower cannot be exported, or INT8 is worth shipping for no tower.
    """
    import msgspec

    from clip_rd_edge.contract.bundle import is_bundle
    from clip_rd_edge.convert.calibration import calibration_pairs
    from clip_rd_edge.convert.targets import BROWSER, plan_export
    from clip_rd_edge.utils.io import refuse_unless_free

    spec, output = os.fspath(model), Path(output)
    refuse_unless_free(output, overwrite=force)
    plan = plan_export(options)
    node_modules = options.get("node_modules")
    bundle = Path(spec) if is_bundle(Path(spec)) else None
    if bundle and options.get("target") != BROWSER:
        raise UsageError(f"{spec} is a bundle already.", hint="give the model that it was made from")
    if plan.layout == BROWSER:
        from clip_rd_edge.web.browser import find_packages, write_from_bundle

        reporter.update("looking for onnxruntime-web")
        find_packages(Path(node_modules) if node_modules else None)
        if bundle:
            wanted = {**options, "labels": plan.request.labels}
            return ExportedBundle(output, write_from_bundle(bundle, output, wanted, pretrained, overwrite=force))
    pairs = calibration_pairs(options.get("calibration"), spec) if plan.request.precision == "int8" else None

    # Only now, so that a mistake in the options is reported at once: PyTorch takes seconds to import.
    from clip_rd_edge.convert.calibration import calibration_set
    from clip_rd_edge.exporters.bundle import export_bundle, package_versions
    from clip_rd_edge.models.encoder import TorchEncoder
    from clip_rd_edge.models.load import load_clip

    reporter.update("loading the model")
    clip = load_clip(spec, pretrained=pretrained)
    drawn = None
    if pairs is not None:
        reporter.update(f"reading images of {pairs.name}")
        drawn = calibration_set(pairs, preprocessing=clip.preprocessing, tokenize=TorchEncoder(clip).tokenize)
    provenance = {"model": spec, "pretrained": pretrained, "device": plan.device, **package_versions()}
    request = msgspec.structs.replace(plan.request, provenance={k: v for k, v in provenance.items() if v})
    with tempfile.TemporaryDirectory() as scratch:
        folder = output if plan.layout == "bundle" else Path(scratch)
        converted = export_bundle(
            clip, folder, request, calibration=drawn, overwrite=force or folder != output, reporter=reporter
        )
        if plan.layout == "immich":
            from clip_rd_edge.convert.immich import write_immich

            write_immich(folder, output, overwrite=force)
        elif plan.layout == BROWSER:
            from clip_rd_edge.web.browser import write_browser

            write_browser(folder, output, node_modules=Path(node_modules) if node_modules else None, overwrite=force)
    return ExportedBundle(output, converted.manifest, converted.trials)


def evaluate(
    model: AnyPath | Model,
    tasks: str | Task | Sequence[str | Task],
    *,
    pretrained: str | None = None,
    threads: int | None = None,
    reporter: Reporter = SILENT,
) -> list[Score]:
    """Zero-shot accuracy and retrieval of a bundle, a run or any open_clip model, one score per task.

    Args:
        model: an open model, or with `pretrained` and `threads` what `load` takes.
        tasks: names as `clip-rd-edge evaluate --task` takes them, or tasks of your own.
    """
    from clip_rd_edge.benchmarking.accuracy import evaluate as score
    from clip_rd_edge.runtime.model import Model

    loaded = load_tasks(tasks)
    opened = model if isinstance(model, Model) else load(model, pretrained=pretrained, threads=threads)
    return [score(opened.encoder, task, reporter=reporter) for task in loaded]


def benchmark(
    suite: AnyPath,
    output: AnyPath,
    *,
    root: str | None = None,
    models: Sequence[str] = (),
    budget_ms: float | None = None,
    min_accuracy: float | None = None,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Results:
    """Measure the models of a suite, accuracy × latency × size, and write the report into `output`.

    Accuracies are kept in `output` as they are measured: after an interruption, the same call goes on from there.

    Args:
        suite: a YAML file, or the name of a suite that is shipped.
        root: folder of the data sets; None takes the suite's.
        models: `ROLE=MODEL` in place of the suite's.
        budget_ms, min_accuracy: what a recommended model has to hold.
        force: write into `output` though it is not empty.
    """
    import msgspec

    from clip_rd_edge.benchmarking.answer_cache import FOLDER, Parts
    from clip_rd_edge.benchmarking.report.plot import require_matplotlib
    from clip_rd_edge.benchmarking.report.text import write_report
    from clip_rd_edge.benchmarking.results import this_environment
    from clip_rd_edge.benchmarking.run import run_suite
    from clip_rd_edge.benchmarking.suite import find_suite, parse_models, read_suite
    from clip_rd_edge.utils.io import refuse_unless_free
    from clip_rd_edge.utils.lock import LOCK, only_writer

    folder = Path(output)
    # What can be refused is refused before the long work.
    interrupted = (folder / FOLDER).is_dir()
    refuse_unless_free(folder, overwrite=force or interrupted, ignoring=(LOCK,))
    require_matplotlib()
    wanted = read_suite(find_suite(os.fspath(suite)), rows=parse_models(models), data_root=root)
    budget = {"budget_ms": budget_ms, "min_accuracy": min_accuracy}
    wanted = msgspec.structs.replace(wanted, **{name: value for name, value in budget.items() if value is not None})
    if models:
        for row in wanted.rows:
            wanted.find(row)  # a model that was named in this call is not skipped
    with only_writer(folder):
        if interrupted:
            reporter.say(f"continuing with what {folder / FOLDER} holds")
        parts = Parts(folder / FOLDER, this_environment())
        opening = partial(open_encoder, threads=wanted.threads)
        results = run_suite(wanted, opening, reporter, fallback=imagenet_templates, parts=parts, launch=first_answer)
        write_report(results, folder)
        parts.remove()
    return results


def compare(old: AnyPath, new: AnyPath) -> Changes:
    """What changed between two benchmark results, files or folders: regressions, improvements, noise."""
    from clip_rd_edge.benchmarking.regression import compare_runs
    from clip_rd_edge.benchmarking.results import RESULTS, read_results

    before, after = (read_results(path / RESULTS if path.is_dir() else path) for path in (Path(old), Path(new)))
    return compare_runs(before, after)


def spread(results: Sequence[AnyPath]) -> str:
    """Means and spreads over several results of one suite, such as of different seeds, as a Markdown table."""
    from clip_rd_edge.benchmarking.results import read_results
    from clip_rd_edge.benchmarking.statistics import seeds_table

    return seeds_table([read_results(Path(path)) for path in results])


def quickstart(
    output: AnyPath = "quickstart",
    *,
    student: str = "resnet10t",
    recipe: str = "clip-rd",
    seed: int = 0,
    with_baseline: bool = False,
    student_steps: int | None = None,
    teacher_steps: int | None = None,
    reporter: Reporter = SILENT,
) -> Results:
    """The whole way on the embedded data set, in minutes, on a CPU; after an interruption it goes on.

    Args:
        student: a preset or a timm architecture.
        seed: of the student.
        with_baseline: train the same student without a teacher, too.
    """
    from clip_rd_edge.walkthrough.pipeline import Settings, run_quickstart

    steps = {"student_steps": student_steps, "teacher_steps": teacher_steps}
    settings = Settings(
        folder=Path(output),
        student=student,
        recipe=recipe,
        seed=seed,
        with_baseline=with_baseline,
        **{name: count for name, count in steps.items() if count is not None},
    )
    return run_quickstart(settings, reporter, partial(open_encoder, threads=1), first_answer)


def evidence_run(
    suite: AnyPath, output: AnyPath, *, teacher: str | None = None, reporter: Reporter = SILENT
) -> Evidence:
    """Train the students of a suite by each of its methods and seeds, measure them, and write tables and figures.

    Args:
        suite: a YAML file, or the name of a suite that is shipped.
        teacher: as `distill` takes it; None tunes the embedded one first.
    """
    from clip_rd_edge.benchmarking.report.plot import require_matplotlib
    from clip_rd_edge.evidence.report import write_report
    from clip_rd_edge.evidence.run import run_evidence
    from clip_rd_edge.evidence.suite import read_evidence

    require_matplotlib()
    evidence = run_evidence(read_evidence(os.fspath(suite)), Path(output), reporter, teacher=teacher)
    for path in write_report(evidence, Path(output)):
        reporter.say(f"written: {path}")
    return evidence


def evidence_report(results: AnyPath, *, into: AnyPath | None = None) -> str:
    """The tables of an evidence file, as Markdown; nothing is trained.

    Args:
        into: a Markdown file whose marked lines are replaced by the tables; figures are drawn beside `results`.
    """
    from clip_rd_edge.evidence.report import markdown, publish, read_evidence_file

    if into is not None:
        publish(Path(results), Path(into))
    return markdown(read_evidence_file(Path(results)))


def verify(bundle: AnyPath, *, threads: int | None = None) -> list[Check]:
    """Check a bundle's files by their checksums and run both towers once, without PyTorch."""
    from clip_rd_edge.runtime.verify import verify_bundle

    return verify_bundle(Path(bundle), threads=threads)


def index(
    bundle: AnyPath,
    folder: AnyPath,
    output: AnyPath,
    *,
    threads: int | None = None,
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> Update:
    """Embed the images below a folder, to be searched; the same call again embeds only what is new or has changed."""
    from clip_rd_edge.runtime.index import update_index
    from clip_rd_edge.runtime.load import load as load_bundle

    encoder = load_bundle(Path(bundle), threads=threads, device=device, spin=False)
    return update_index(encoder, Path(folder), Path(output), reporter=reporter)


def search(
    index: AnyPath,
    query: str | ImageInput,
    *,
    top: int = 10,
    bundle: AnyPath | None = None,
    threads: int | None = None,
    device: str = "auto",
) -> list[Hit]:
    """The images of an index that are nearest to a text or an image, nearest first.

    Args:
        query: a text, the path of an image file, a PIL image or an array.
        bundle: where the bundle that made the index lies now, if it was moved.
    """
    from clip_rd_edge.runtime.index import search_index

    return search_index(Path(index), query, top=top, bundle=bundle, threads=threads, device=device)


def demo(
    bundles: AnyPath | Sequence[AnyPath],
    *,
    labels: Sequence[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 8765,
    threads: int | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a page on this machine to try bundles on, with camera or files, until Ctrl-C.

    Args:
        labels: what the page starts with; None takes the bundle's own.
        ready: called with the page's address once it can be opened.
    """
    from clip_rd_edge.web.app import Demo, serve

    paths = [bundles] if isinstance(bundles, str | os.PathLike) else bundles
    serve(Demo([Path(path) for path in paths], labels=labels, threads=threads), host=host, port=port, ready=ready)


def devices(name: str | None = None) -> dict[str, Device]:
    """Where a bundle can run, by name: what is needed there, how to export for it, and what of this was tested."""
    from clip_rd_edge.convert.targets import device_names, read_device

    return {each: read_device(each) for each in ([name] if name else device_names())}


def doctor() -> list[Finding]:
    """What this machine can do for a bundle, what is missing, and the command that installs it."""
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
    """Open a bundle without PyTorch, or a model with it; arguments and errors as `load`."""
    from clip_rd_edge.contract.bundle import is_bundle
    from clip_rd_edge.contract.checkpoint import model_folder

    path = Path(spec.removeprefix("local-dir:"))
    if is_bundle(path):
        if runtime == "torch" or runtime == "torch-compile":
            raise UsageError(f"{spec} is a bundle, which torch does not run.", hint="name the model it was made from")
        from clip_rd_edge.runtime.load import load as load_bundle

        return load_bundle(path, threads=threads, runtime=runtime, device=device)
    if runtime not in (None, "torch", "torch-compile"):
        raise UsageError(f"{spec} is no bundle: {runtime} cannot run it.", hint="clip-rd-edge export makes one")
    import torch

    from clip_rd_edge.models.encoder import CompiledEncoder, TorchEncoder
    from clip_rd_edge.models.load import load_clip

    if threads is not None:
        torch.set_num_threads(threads)
    kind = CompiledEncoder if runtime == "torch-compile" else TorchEncoder
    return kind(load_clip(spec, pretrained=pretrained), folder=model_folder(spec))


def load_tasks(tasks: str | Task | Sequence[str | Task]) -> list[Task]:
    """Tasks by the names that `evaluate` takes; labels without templates go into CLIP's for ImageNet."""
    from clip_rd_edge.data.tasks import load_task

    names = [tasks] if isinstance(tasks, str) or not isinstance(tasks, Sequence) else tasks
    unique = [name for i, name in enumerate(names) if name not in names[:i]]
    return [load_task(name, fallback=imagenet_templates) if isinstance(name, str) else name for name in unique]


def first_answer(spec: str, runtime: RowRuntime | None, threads: int) -> list[str]:
    """The command of a process that answers once, to time a cold start by; an image's path is to be its last word."""
    return [sys.executable, "-m", "clip_rd_edge.cli._first_answer", spec, runtime or "", str(threads)]


def imagenet_templates() -> Templates:
    """open_clip's OPENAI_IMAGENET_TEMPLATES for data sets that have none, else a neutral one where it is missing."""
    from clip_rd_edge.data.clip_benchmark import Templates, neutral

    try:
        from open_clip import OPENAI_IMAGENET_TEMPLATES
    except ImportError:
        return neutral()
    return Templates(tuple(fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES), "ImageNet's, from open_clip")


def _evaluator(config: RunConfig) -> Callable[[Any], dict[str, float]] | None:
    """Top-1 or recall at 1 of the student on each of the run's tasks."""
    if not config.tasks:
        return None
    from clip_rd_edge.benchmarking.accuracy import evaluate as score
    from clip_rd_edge.benchmarking.metrics import primary_metric

    tasks = load_tasks(config.tasks)
    return lambda encoder: {task.name: primary_metric(score(encoder, task)) for task in tasks}
