"""What a run is made from: loaded, and checked before anything is written."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from clip_rd_edge.bundle.runs import WEIGHTS_FILE, model_folder
from clip_rd_edge.data.folders import Folder
from clip_rd_edge.data.load import TrainingData, load_samples, names_shards
from clip_rd_edge.data.samples import BadSamples, Samples, require_batch, require_images
from clip_rd_edge.data.tables import Table
from clip_rd_edge.distillation.checkpoint import seed_everything
from clip_rd_edge.distillation.config import RunConfig, is_texts_alone
from clip_rd_edge.distillation.loader import ViewDataset
from clip_rd_edge.distillation.pixels import crops_for
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.student import make_student, require_named_student, set_training_mode
from clip_rd_edge.distillation.teacher import ensemble_of, load_stored_teachers, load_teachers
from clip_rd_edge.errors import UsageError
from clip_rd_edge.losses.ensemble import Ensemble
from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.losses.terms import find_term
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.utils.files import sha256_of
from clip_rd_edge.utils.paths import Typed
from clip_rd_edge.utils.text import SILENT, Reporter

if TYPE_CHECKING:
    from clip_rd_edge.data.tasks import Task
    from clip_rd_edge.distillation.reinforced import StoredTeachers


@dataclass(frozen=True)
class RunSetup:
    """Samples, models and objective of a run. There are no `teachers` if the objective does not need one.

    With `stored` teachers, the pairs are `Reinforced`, which have the embeddings, and there are no other teachers.
    `ensemble` joins the embeddings of either into those of one; None without a teacher.

    `pairs` may be `Mixed`, in which images and captions do not always belong together.

    `tasks` are those that the student is evaluated on.
    """

    pairs: Samples
    teachers: tuple[ClipModel, ...]
    student: ClipModel
    objective: Objective
    stored: StoredTeachers | None = None
    ensemble: Ensemble | None = None
    tasks: Sequence[Task] = ()

    @cached_property
    def task_fingerprints(self) -> dict[str, str]:
        """The fingerprint of each task by its name."""
        if not self.tasks:
            return {}
        from clip_rd_edge.benchmarking.accuracy import task_fingerprint  # which most runs do without

        return {task.name: task_fingerprint(task) for task in self.tasks}

    def total_steps(self, config: RunConfig) -> int:
        """Return the number of steps of a run: the recipe's `steps`, or its epochs times the full batches of each."""
        return config.recipe.steps or config.recipe.epochs * (len(self.pairs) // config.recipe.batch_size)

    @property
    def teacher_names(self) -> list[str]:
        """The names of all teachers."""
        return [teacher.name for teacher in (self.stored.teachers if self.stored else self.teachers)]


def load_setup(
    config: RunConfig,
    *,
    name: str,
    processes: Processes,
    reporter: Reporter = SILENT,
) -> RunSetup:
    """Load the pairs, the models and the objective that a configuration names.

    Args:
        name: the student's name.
        processes: the processes that share a batch. The main one indexes the shards; the others read its index.
    """
    if config.quantize:
        from clip_rd_edge.distillation.quantized import require_quantizable

        require_quantizable(config)
    with processes.main_first():
        require_named_student(config)
        pairs = training_pairs(config, reporter=reporter)
    with processes.together():  # a machine may lack a file that the others have
        return _load_models(config, pairs, name=name, processes=processes, reporter=reporter)


def _load_models(config: RunConfig, pairs: Samples, *, name: str, processes: Processes, reporter: Reporter) -> RunSetup:
    BadSamples(pairs, max_share=config.max_bad)  # refuses too many before the models are loaded
    if count := pairs.problems.count:
        lost = f", and about {pairs.problems.lost:,} are lost in damaged shards" if pairs.problems.lost else ""
        left_out = f"{count:,} samples are not pairs and were" if count > 1 else "1 sample is not a pair and was"
        reporter.note(f"{left_out} skipped{lost}; the first: {pairs.problems.examples[0]}")
    require_batch(pairs, config.recipe.batch_size, processes=processes.world_size)
    _require_terms_for(config, pairs)
    if is_texts_alone(config) and config.store is not None:
        require_images(pairs)
    stored = load_stored_teachers(config)
    teachers = load_teachers(config)
    ensemble = stored.ensemble if stored else ensemble_of(teachers) if teachers else None
    if ensemble and ensemble.share_text:
        reporter.note("the teachers share a text tower: the student learns the mean of their image embeddings")
    seed_everything(config.seed)
    student = make_student(config, teachers, name=name, reporter=reporter)
    set_training_mode(student, config)  # refuses what cannot be frozen, before anything is written or cached
    objective = Objective(
        config.recipe.objective.for_texts() if is_texts_alone(config) else config.recipe.objective,
        scales=config.recipe.scales,
        scale_start=config.recipe.scale_start,
        widths=(student.embedding_size, *ensemble.widths) if ensemble else None,
        bank_temperature=config.recipe.bank_temperature,
    )
    setup = RunSetup(pairs, teachers, student, objective, stored, ensemble)
    _require_matching_towers(config, setup)
    return setup


def _require_matching_towers(config: RunConfig, setup: RunSetup) -> None:
    """Refuse an objective that trains the student's images and texts only through a projection for each."""
    objective = setup.objective
    terms = [find_term(name) for name in objective.weights]
    if not objective.has_projections or any(
        term.matches and ("pairs" not in term.needs or setup.pairs.counts.pairs) for term in terms
    ):
        return
    size, of_teachers = setup.student.embedding_size, sum(objective.teacher_widths)
    recipe = "" if is_texts_alone(config) else ", or another recipe: {recipe} clip-rd"
    raise UsageError(
        f"The embeddings of the student have {size} entries and those of {' and '.join(setup.teacher_names)} "
        f"{of_teachers}, and no term of the objective compares the student's images with its texts: they would not "
        "match, since each learns a projection of its own.",
        hint=f"name one teacher with embeddings of {size}, or give the student theirs: {{embedding_size}} {of_teachers}"
        f"{recipe}",
    )


def _require_terms_for(config: RunConfig, pairs: Samples) -> None:
    """Refuse an objective whose terms all need something that the data lack."""
    objective, of_texts = config.recipe.objective, is_texts_alone(config)
    if of_texts and config.quantize:
        raise UsageError(
            "There are texts alone, but it is the image tower that is trained for INT8.",
            hint="name images: {images} FOLDER, or {data} PAIRS",
            option="quantize",
        )
    if not objective.for_texts() if of_texts else objective.needs_pairs and not pairs.counts.pairs:
        what = "images" if of_texts else "pairs of images and captions alone"
        raise UsageError(
            f"The recipe {config.recipe_name} trains on {what}, but the data have none.",
            hint="name some with {data}, or another recipe: {recipe} clip-rd",
            option="recipe",
        )


def lack_of_pairs(config: RunConfig, pairs: Samples) -> list[str]:
    """Return sentences on what a run cannot do if it has no pairs; none if it has."""
    if pairs.counts.pairs:
        return []
    if is_texts_alone(config):
        trained = ", ".join(config.recipe.objective.for_texts())
        return [f"without images, the text tower alone is trained, by these terms of the objective: {trained}"]
    left_out = config.recipe.objective.needing("pairs")
    terms = [f"without pairs, these terms of the objective are 0: {', '.join(left_out)}"] if left_out else []
    if config.tasks:
        return terms
    return [
        *terms,
        "without pairs or a --task, the run cannot tell how often the student is right: evaluate it on images that you "
        "have labelled",
    ]


def training_pairs(config: RunConfig, *, reporter: Reporter = SILENT) -> Samples:
    """Return what a run trains on; raises as `data.load.load_samples`."""
    source = TrainingData(**{name: getattr(config, name) for name in TrainingData.__struct_fields__})
    if (stored := load_stored_teachers(config)) is not None:
        from clip_rd_edge.distillation.reinforced import reinforced_pairs

        return reinforced_pairs(source, stored, reporter)

    def read_texts(path: Typed, column: str) -> Sequence[str]:
        from clip_rd_edge.runtime.labels import read_texts

        return read_texts(path, column)

    return load_samples(source, read_texts, reporter=reporter)


def make_dataset(config: RunConfig, setup: RunSetup, *, with_teacher_pixels: bool = True) -> ViewDataset:
    """Return the data set of views that a run trains on."""
    teachers = setup.teachers if with_teacher_pixels else ()
    student = setup.student
    options: dict[str, Any] = {"seed": config.seed, "views": config.views, "max_bad": config.max_bad}
    if setup.stored is not None:
        from clip_rd_edge.distillation.reinforced import Reinforced, ReinforcedDataset

        assert isinstance(setup.pairs, Reinforced)
        dataset: ViewDataset = ReinforcedDataset(setup.pairs, setup.stored, student.preprocessing, **options)
    else:
        seen = [teacher.preprocessing for teacher in teachers]
        crops = crops_for(student.preprocessing, config.recipe.crop_scale, config.decode)
        dataset = ViewDataset(setup.pairs, student.preprocessing, seen, crops=crops, **options)
        # With a store, too: the student sees the same pixels whether or not the teachers see them now.
        dataset.min_edge = crops.min_edge(model.preprocessing for model in (student, *setup.teachers))
    dataset.tokenizers = tuple(model.tokenizer for model in (student, *teachers))
    return dataset


RECORDED_PACKAGES = ("clip-rd-edge", "torch", "open_clip_torch", "timm", "numpy", "pillow")


def provenance(config: RunConfig, setup: RunSetup, *, steps: int) -> dict[str, Any]:
    """Return the content of distillation.json: recipe, teacher, data, seed, versions."""
    digests = [_weights_sha256(name) for name in config.teachers] if setup.teachers else []
    return {
        "recipe": config.recipe_name,
        "configuration": msgspec.to_builtins(config),
        "teacher": _one_or_all(setup.teacher_names),
        "teacher_sha256": _one_or_all(digests),
        "data": config.data,
        "image_source": config.images,
        **setup.pairs.counts.recorded(),
        "steps": steps,
        "seed": config.seed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()} {platform.system()}",
        "versions": {name: version(name) for name in RECORDED_PACKAGES},
    }


def _weights_sha256(teacher: str) -> str | None:
    folder = model_folder(teacher)
    weights = folder / WEIGHTS_FILE if folder else None
    return sha256_of(weights) if weights and weights.is_file() else None


def _one_or_all(values: Sequence[str | None]) -> str | list[str | None] | None:
    return list(values) if len(values) > 1 else values[0] if values else None


def fitting_batch(config: RunConfig) -> int:
    """Return the size of a run's batches, or the number of its samples if that is less. Shards have enough."""
    places = (config.data, config.images)
    if any(place is not None and names_shards(place) for place in places):
        return config.recipe.batch_size
    return min(config.recipe.batch_size, len(training_pairs(config)))


def note_overlap(config: RunConfig, tasks: Sequence[Task], *, reporter: Reporter = SILENT) -> None:
    """Report which images of tasks are trained on, by their content: names and compression may differ."""
    if any(place is not None and names_shards(place) for place in (config.data, config.images)):
        return
    from clip_rd_edge.data.look import overlap

    trained = image_paths(training_pairs(config))
    for task in tasks:
        evaluated = [image for image in task.images if isinstance(image, Path)]
        found, count = overlap(trained, evaluated, reporter=reporter) if trained and evaluated else ([], 0)
        if found:
            own, other = found[0]
            reporter.note(
                f"{len(found):,} of {count:,} images of {task.name} are trained on, such as {other.name} as {own}: its "
                "scores are not of new images"
            )


def image_paths(samples: Samples) -> list[Path]:
    """Return the files of those samples that are files."""
    if isinstance(samples, Table):
        return [samples.pair(index).path for index in range(len(samples))]
    return list(samples.images) if isinstance(samples, Folder) else []
