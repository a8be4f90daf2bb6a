"""Train a student, average two models, and make what training needs: stores of embeddings, packed data, recipes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from clip_rd_edge.api.models import open_encoder
from clip_rd_edge.bundle.runs import DATA_FOLDER, RUN_CONFIG_FILE
from clip_rd_edge.errors import ClipRdEdgeError, UsageError
from clip_rd_edge.settings.measuring import Build
from clip_rd_edge.settings.options import keywords_of
from clip_rd_edge.settings.training import Average, Distill, Embed, Pack
from clip_rd_edge.utils.paths import AnyPath, is_file, several, typed

if TYPE_CHECKING:
    from clip_rd_edge.data.tasks import Task
    from clip_rd_edge.data.webdataset import Packed
    from clip_rd_edge.distillation.config import RunConfig
    from clip_rd_edge.models.edit import AveragedModel


@keywords_of(Distill)
def distill(request: Distill) -> Path:
    """Train a compact student and return the run's folder. open_clip loads its `student/` as `local-dir:PATH`.

    Raises:
        UsageError: `output` is in use, or an option is invalid.
        InputError, ConfigError: the data, teacher, student or recipe is missing or invalid.
        InterruptedRunError: a signal stopped the run; its state was saved.
    """
    from clip_rd_edge.distillation.config import resolve
    from clip_rd_edge.distillation.run import run_distillation
    from clip_rd_edge.distillation.setup import fitting_batch, note_overlap
    from clip_rd_edge.distillation.speed import with_steps_for

    run = Path(request.output)
    with _told_to_all_processes():
        options = _without(request, "output", "resume", "accept_changes", "hours", "hold_out")
        if request.hours is not None or request.hold_out is not None:
            options |= _settled(request)
        config = resolve(**options)
        if request.batch_size is None and 2 <= (size := fitting_batch(config)) < config.recipe.batch_size:
            config = resolve(**{**options, "batch_size": size})
        tasks = _tasks(config)
        if tasks and not is_file(run / RUN_CONFIG_FILE):
            note_overlap(config, tasks, reporter=request.reporter)
        if request.hours is not None:
            config = with_steps_for(config, run, request.hours, reporter=request.reporter)
    run_distillation(
        config,
        run,
        resume=request.resume,
        accept_changes=request.accept_changes,
        reporter=request.reporter,
        evaluate=_evaluator(tasks),
        tasks=tasks,
    )
    return run


def _settled(request: Distill) -> dict[str, Any]:
    """Return the options of a run that follow from `hold_out`, whose images are divided in RUN/data."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "{hours} and {hold_out} are for a run in one process; this one has several.",
            hint="name {steps}, and the images that were held back before with {tasks}",
            option="hours" if request.hold_out is None else "hold_out",
        )
    if request.hours is not None and (request.steps is not None or request.epochs is not None):
        raise UsageError("{hours} decides the number of steps.", hint="omit {steps} and {epochs}", option="hours")
    if request.hold_out is None:
        return {}
    others = [name for name in ("images", "texts", "templates") if getattr(request, name)]
    if request.data is None or others:
        raise UsageError(
            f"{{hold_out}} divides {{data}} alone{f', and {{{others[0]}}} was given' if others else ''}.",
            hint="hold images back yourself, and name them with {tasks}",
            option="hold_out",
        )

    from clip_rd_edge.building.look import TRAIN, look, task_of
    from clip_rd_edge.utils.outputs import LOCK_FILE, require_free_output

    run, columns = Path(request.output), (request.csv_img_key, request.csv_caption_key)
    if not is_file(run / RUN_CONFIG_FILE):
        require_free_output(run, overwrite=False, ignoring=(DATA_FOLDER, LOCK_FILE))
    folder = run / DATA_FOLDER
    data, reporter = typed(request.data), request.reporter
    found = look(data, folder, share=request.hold_out, chosen_by=0, columns=columns, reporter=reporter)
    for line in found.lines:
        reporter.note(line)
    return {
        "data": folder / TRAIN,
        "tasks": (*several(request.tasks), task_of(folder, found, "test")),
        "evaluate_every": request.evaluate_every or request.checkpoint_every,
        "csv_img_key": "filepath", "csv_caption_key": "title",
    }  # fmt: skip


@keywords_of(Embed)
def embed(request: Embed) -> Path:
    """Compute the embeddings of a teacher, or of several, for `distill(store=output)`; return the folder.

    Embeddings in `output` are kept, so the same call continues an interrupted one. Processes of torchrun share the
    work, and so do the workers of a Ray cluster, whose machines need the same data and teacher, but not the output.

    Raises:
        UsageError: `output` holds something else, or a store that does not match; the cluster cannot be reached; or
            there is no teacher.
        InputError, ConfigError: the data, teacher or recipe is missing or invalid, or the value of an option.
    """
    from clip_rd_edge.distillation.config import resolve
    from clip_rd_edge.distillation.embed import embed_teacher

    with _told_to_all_processes():
        config = resolve(**{**_without(request, "output", "ray"), "student": request.student or "resnet18"})
    embed_teacher(config, Path(request.output), cluster=request.ray, reporter=request.reporter)
    return Path(request.output)


@keywords_of(Pack)
def pack(request: Pack) -> Packed:
    """Write training data as shards of small images. Give the result's `source` to `distill` as `data`.

    Shards in `output` are kept, so the same call continues an interrupted one.

    Raises:
        UsageError: `output` holds something else, or shards of other data.
        InputError: the data are missing, or too many samples are bad.
    """
    from clip_rd_edge.bundle.labels import parse_templates
    from clip_rd_edge.data.load import TrainingData, load_pairs
    from clip_rd_edge.data.webdataset import pack_samples

    data, reporter = TrainingData(data=typed(request.data)).data or typed(""), request.reporter
    if request.without_captions:
        samples = load_pairs(data, image_key=request.csv_img_key, caption_key=None, reporter=reporter)
    else:
        templates = parse_templates([typed(request.template)]).prompts if request.template else ()
        samples = load_pairs(
            data, image_key=request.csv_img_key, caption_key=request.csv_caption_key,
            json_key=request.json_caption_key, templates=templates, reporter=reporter,
        )  # fmt: skip
        if len(templates) > 1 or (templates and not samples.counts.classes):
            # Of several, each image of a step would get another: captions of one class would differ.
            raise UsageError("A template is one prompt, for the names of class folders.", option="template")
    return pack_samples(samples, Path(request.output), edge=request.edge, max_bad=request.max_bad, reporter=reporter)


def _without(request: Distill | Embed, *names: str) -> dict[str, Any]:
    """Return the settings of a run: the fields of a request without those that concern only the call."""
    return {name: value for name, value in msgspec.structs.asdict(request).items() if name not in (*names, "reporter")}


@keywords_of(Average)
def average(request: Average) -> AveragedModel:
    """Average the weights of two models of one architecture: (1 − weight) · first + weight · second.

    A fine-tuned model has forgotten some of what it could do before; models between the two are nearly as good at both
    (WiSE-FT, Wortsman et al. 2022). With tasks, the result's `curve` has the accuracy of each weight, which
    distillation.json records. open_clip loads the result as `local-dir:PATH`.

    Raises:
        UsageError: `output` is in use or holds one of the two models, or the best weight has no task to be measured on.
        ConfigError: the models differ in more than their weights, or the weight is not between 0 and 1.
        InputError: a model or a task does not exist.
    """
    # Before the models, so that a mistyped name is reported at once.
    tasks = _load_tasks(request.tasks, templates=request.templates)

    from clip_rd_edge.models.edit import average_models

    return average_models(
        (typed(request.first), typed(request.second)), Path(request.output), weight=request.weight,
        score=_evaluator(tasks), force=request.force, reporter=request.reporter,
    )  # fmt: skip


def recipe(name: AnyPath | None = None) -> str:
    """Return a recipe as YAML with comments, to start your own from; without a name, a list of the shipped recipes.

    Args:
        name: a name such as `clip-rd`, or a YAML file.

    Raises:
        ConfigError: there is no such recipe, or it is invalid.
    """
    from clip_rd_edge.distillation.config import commented_recipe, describe_recipes

    return describe_recipes() if name is None else commented_recipe(os.fspath(name))


@contextmanager
def _told_to_all_processes() -> Iterator[None]:
    """Within the block, an error also ends the other processes of the run, which would wait for this one to join."""
    try:
        yield
    except (ClipRdEdgeError, ModuleNotFoundError) as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from clip_rd_edge.distillation.processes import tell_failure

            tell_failure(error if isinstance(error, ClipRdEdgeError) else UsageError(f"{error}."))
        raise


def _evaluator(tasks: Sequence[Task]) -> Callable[[Any], dict[str, float]] | None:
    """Return a function that scores the student on each task by top-1 accuracy or R@1; None without tasks."""
    if not tasks:
        return None
    from clip_rd_edge.benchmarking.accuracy import evaluate as score
    from clip_rd_edge.benchmarking.metrics import primary_metric

    return lambda encoder: {task.name: primary_metric(score(encoder, task)) for task in tasks}


def _tasks(config: RunConfig) -> list[Task]:
    """Load the tasks of a run; a table has the columns of its data."""
    columns = {"csv_img_key": config.csv_img_key, "csv_caption_key": config.csv_caption_key}
    return _load_tasks(config.tasks, **columns)


def _load_tasks(names: AnyPath | Iterable[AnyPath], **options: Any) -> list[Task]:
    if not names:
        return []
    from clip_rd_edge.api.measuring import load_tasks

    return load_tasks(names, **options)


@dataclass(frozen=True)
class BuiltBundle(os.PathLike[str]):
    """What a build has made. It is path-like: pass it wherever the path of a bundle is expected.

    Attributes:
        folder: the bundle's folder.
        verdict: how good it is, and what would help next, a sentence each.
        report: the page that compares it with teacher and student.
        held_out: the images held back, on which the figures were measured: a task for `evaluate`.
    """

    folder: Path
    verdict: tuple[str, ...]
    report: Path
    held_out: Path

    def __fspath__(self) -> str:
        return str(self.folder)


@keywords_of(Build)
def build(request: Build) -> BuiltBundle:
    """Build a bundle for a device from your own images: look at them, hold some back, distil, export, compare.

    Each stage keeps its result in `output`, and is skipped where nothing has changed: an interrupted call is continued
    by the same one, and another `target` trains nothing again.

    Raises:
        UsageError: `output` is in use or was built otherwise, or an option is invalid.
        InputError, ConfigError: the data, teacher, student or target is missing or invalid.
        InterruptedRunError: a signal stopped the build; its state was saved.
    """
    from clip_rd_edge.benchmarking.report import require_matplotlib

    require_matplotlib()

    from clip_rd_edge.benchmarking.report import HTML
    from clip_rd_edge.building.look import task_of
    from clip_rd_edge.building.stages import Building

    building = Building(request, partial(open_encoder, threads=1))
    lines = tuple(building())
    report, held_out = building.folder / "report" / HTML, task_of(building.folder, building.found, "test")
    return BuiltBundle(building.bundle, lines, report, held_out)
