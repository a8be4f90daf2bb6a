"""What a run is made from: loaded, checked before anything is written, and known again when the run is resumed."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from clip_rd_edge.bundle.runs import INPUTS_FILE, RUN_CONFIG_FILE, STUDENT_FOLDER, WEIGHTS_FILE, model_folder
from clip_rd_edge.data.load import TrainingData, load_samples, names_shards
from clip_rd_edge.data.samples import BadSamples, Samples, fingerprint, require_batch, require_images
from clip_rd_edge.distillation.checkpoint import list_checkpoints, seed_everything
from clip_rd_edge.distillation.config import LOCATIONS, RecordedConfig, RunConfig, is_texts_alone, plain_values
from clip_rd_edge.distillation.loader import ViewDataset
from clip_rd_edge.distillation.pixels import crops_for
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.student import make_student, require_named_student, set_training_mode, text_source
from clip_rd_edge.distillation.teacher import ensemble_of, load_stored_teachers, load_teachers
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.losses.terms import Ensemble, find_term, own_terms, source_of
from clip_rd_edge.models.clip import ClipModel, form_fingerprint, model_fingerprint
from clip_rd_edge.models.names import is_trained, student_file
from clip_rd_edge.utils.files import sha256_of, write_bytes, write_text
from clip_rd_edge.utils.paths import Typed, is_file
from clip_rd_edge.utils.structs import read_json, read_yaml, to_json, to_yaml
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

    def total_steps(self, config: RunConfig) -> int:
        """Return the number of steps of a run: the recipe's `steps`, or its epochs times the full batches of each."""
        return config.recipe.steps or config.recipe.epochs * (len(self.pairs) // config.recipe.batch_size)

    @property
    def teacher_names(self) -> list[str]:
        return [teacher.name for teacher in (self.stored.teachers if self.stored else self.teachers)]


def load_setup(config: RunConfig, *, name: str, processes: Processes, reporter: Reporter = SILENT) -> RunSetup:
    """Load the pairs, the models and the objective that a configuration names; `name` is the student's.

    The main process indexes the shards; the others read its index.
    """
    with processes.together():
        require_named_student(config)
    pairs = processes.main_first(lambda: training_pairs(config, reporter=reporter))
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
    objective, of_texts = config.recipe.objective, is_texts_alone(config)
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
    return [f"without pairs, these terms of the objective are 0: {', '.join(left_out)}"] if left_out else []


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
    folders = map(model_folder, config.teachers if setup.teachers else ())
    names, digests = setup.teacher_names, [sha256_of_file(folder and folder / WEIGHTS_FILE) for folder in folders]
    return {
        "recipe": config.recipe_name,
        "configuration": msgspec.to_builtins(config),
        "teacher": names[0] if len(names) == 1 else names or None,
        "teacher_sha256": digests[0] if len(digests) == 1 else digests or None,
        "data": config.data,
        "image_source": config.images,
        **setup.pairs.counts.recorded(),
        "steps": steps,
        "seed": config.seed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()} {platform.system()}",
        "versions": {name: version(name) for name in RECORDED_PACKAGES},
    }


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
    from clip_rd_edge.data.look import image_paths, overlap

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


_SHOWN_DIGITS = 12


class RunInputs(msgspec.Struct, frozen=True, kw_only=True):
    """Fingerprints of data, teacher and trained student, which do not depend on the folders that they lie in.

    Attributes:
        left_out: number of samples that are not pairs, such as those in the lost part of a shard.
        samples: how many rows of which kinds, in words.
        pairs_sha256: see `data.samples.fingerprint`.
        teacher_sha256: `models.clip.model_fingerprint` of each teacher, with its preprocessing; stored ones have one.
        student_sha256: the same of a trained student that is trained on; None for a new one.
        image_weights_sha256, text_weights_sha256: of the file that a tower of the student starts from; None for what is
            no file, or for a file that is gone.
        text_sha256: of the text tower and tokenizer that a new student takes from a model's folder; None for others.
        student_file_sha256: of the JSON file with a new student's architecture and preprocessing; None for others.
        form_sha256: of what a checkpoint's weights belong to: the student's form and the teachers' embedding sizes.
        terms_sha256: of the code of each own loss term of the recipe, by its name.
    """

    samples: str
    left_out: int
    pairs_sha256: str
    teacher_sha256: tuple[str, ...] = ()
    student_sha256: str | None = None
    image_weights_sha256: str | None = None
    text_weights_sha256: str | None = None
    text_sha256: str | None = None
    student_file_sha256: str | None = None
    form_sha256: str = ""
    terms_sha256: dict[str, str] = {}

    @property
    def counts(self) -> str:
        """How many samples there are, in words."""
        return self.samples + (f" and {self.left_out:,} samples that are not pairs" if self.left_out else "")


# What a difference of a fingerprint means, the cause before what follows from it.
_MEANINGS = {
    "text_sha256": "the text tower that the student starts from has other weights or another tokenizer",
    "student_file_sha256": "the file of the student's architecture has another content",
    "student_sha256": "the model that it trains on has other weights, another configuration or another tokenizer",
    "image_weights_sha256": "the image weights that the student starts from are others",
    "text_weights_sha256": "the text weights that the student starts from are others",
    "form_sha256": "the student has another architecture, tokenizer or preprocessing",
}
# The weights of a checkpoint belong to the tokens and the architecture that they were trained with.
_OF_STUDENT = ("form_sha256", "text_sha256", "student_file_sha256")


def teachers_digest(inputs: RunInputs) -> str:
    """Return a digest of the teachers and of how they see images, by which their embeddings are known again."""
    return _digest(inputs.teacher_sha256)


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()


def inputs_of(config: RunConfig, setup: RunSetup) -> RunInputs:
    """Return the fingerprints of a run's data and models."""
    teachers = tuple(_digest((model_fingerprint(clip), clip.preprocessing)) for clip in setup.teachers)
    if setup.stored is not None:
        teachers = (_digest(setup.stored),)
    takes_text = not is_trained(config.student) and text_source(config)  # whose weights the student still has
    text = replace(setup.student, model=setup.student.model.get_submodule("text")) if takes_text else None
    form = form_fingerprint(setup.student), setup.objective.teacher_widths
    return RunInputs(
        **data_inputs(setup.pairs),
        teacher_sha256=teachers,
        student_sha256=model_fingerprint(setup.student) if is_trained(config.student) else None,
        image_weights_sha256=sha256_of_file(config.pretrained_image),
        text_weights_sha256=sha256_of_file(config.pretrained_text),
        text_sha256=model_fingerprint(text) if text else None,
        student_file_sha256=sha256_of_file(student_file(config.student)),
        form_sha256=_digest(form),
        terms_sha256={name: source_of(name) for name in own_terms(config.recipe.objective)},
    )


def data_inputs(pairs: Samples) -> dict[str, Any]:
    """Return those of the fingerprints that are of the data."""
    return {"left_out": pairs.problems.count, "samples": str(pairs.counts), "pairs_sha256": fingerprint(pairs)}


def sha256_of_file(name: str | Path | None) -> str | None:
    """Return the digest of a file, None if there is none of this name."""
    return sha256_of(Path(name)) if name and is_file(name) else None


def common_inputs(config: RunConfig, setup: RunSetup, processes: Processes) -> RunInputs:
    """Return the fingerprints of data and models, which must be the same in all processes.

    Machines that do not share their files may hold different ones under the same names.
    """
    with processes.together():
        inputs = inputs_of(config, setup)
    first, *others = processes.gather_objects(inputs)
    for rank, other in enumerate(others, start=1):
        if difference := input_difference(first, other, data=setup.pairs.name, teachers=setup.teacher_names):
            raise InputError(
                f"Process {rank} of the run{processes.where(rank)} reads other files than process 0: {difference}.",
                hint="give all machines the same data and the same models",
            )
    return first


def check_inputs(
    run: Path, inputs: RunInputs, setup: RunSetup, *, accept_changes: bool, reporter: Reporter = SILENT
) -> None:
    """Check that data and models are those of RUN/inputs.json, if there is one.

    A run without a checkpoint starts again, with whatever is there now, which is recorded. Otherwise, `record_inputs`
    has to follow once the checkpoint is loaded: until then, the run can go on with its earlier inputs.

    Args:
        setup: names data and models.
        accept_changes: report a difference instead of raising, unless the run is finished, or its student would get
            another tokenizer, architecture or preprocessing, or a teacher another embedding size.
    """
    has_checkpoint = bool(list_checkpoints(run))
    if is_file(run / INPUTS_FILE):
        old = read_json(run / INPUTS_FILE, RunInputs)
        difference = input_difference(old, inputs, data=setup.pairs.name, teachers=setup.teacher_names)
        if difference is None:
            return
        is_finished = is_file(run / STUDENT_FOLDER / WEIGHTS_FILE)
        is_acceptable = not is_finished and all(getattr(old, name) == getattr(inputs, name) for name in _OF_STUDENT)
        if is_finished or (has_checkpoint and not (accept_changes and is_acceptable)):
            ways = [f"name or restore those in {run / RUN_CONFIG_FILE}", "start a new run with another {output}"]
            ways += ["go on with the new ones: {accept_changes}"] * is_acceptable
            raise UsageError(f"{run} began with other inputs: {difference}.", hint=", or ".join(ways))
        reporter.note(f"the run goes on with changed inputs: {difference}")
    if not has_checkpoint:
        record_inputs(run, inputs)


def record_inputs(run: Path, inputs: RunInputs) -> None:
    """Write RUN/inputs.json: the run has begun with these, or goes on with them."""
    write_bytes(run / INPUTS_FILE, to_json(inputs))


def sources_known_by_content(run: Path, new: RunConfig) -> frozenset[str]:
    """Return the fields of a run's configuration that RUN/inputs.json decides, whatever path they name.

    A path alone does not: it may be relative to another working directory, or that of a copy on another machine.
    Weights to start from are known by a file alone, and a checkpoint has replaced them.
    """
    if not is_file(run / INPUTS_FILE):
        return frozenset()
    inputs = read_json(run / INPUTS_FILE, RunInputs)
    weights = {"pretrained_image": inputs.image_weights_sha256, "pretrained_text": inputs.text_weights_sha256}
    return LOCATIONS - {name for name, sha256 in weights.items() if not (sha256 and is_file(getattr(new, name) or ""))}


def record_locations(run: Path, config: RunConfig) -> None:
    """Have RUN/config.yaml name the paths that the run reads now."""
    old = plain_values(read_yaml(run / RUN_CONFIG_FILE, RecordedConfig))
    new = {name: value if name in LOCATIONS else old[name] for name, value in plain_values(config).items()}
    if new != old:
        write_text(run / RUN_CONFIG_FILE, to_yaml(new))


def input_difference(old: RunInputs, new: RunInputs, *, data: str, teachers: Sequence[str]) -> str | None:
    """Return in words what differs, and how; None if nothing does, or what differs was or is not known."""
    if old.counts != new.counts:
        return f"{data} has {new.counts}, in place of {old.counts}"
    count = len(old.teacher_sha256)
    if count != len(new.teacher_sha256):
        return f"there are {len(new.teacher_sha256)} teachers, in place of {count}"
    names = teachers if len(teachers) == count else [" and ".join(teachers)]  # stored ones have one digest together
    of_teachers = zip(names, old.teacher_sha256, new.teacher_sha256, strict=False)
    of_terms = ((name, was, new.terms_sha256.get(name)) for name, was in old.terms_sha256.items())
    changes = [
        (f"{data} has as many samples, but other names, captions, sizes or another order",
         old.pairs_sha256, new.pairs_sha256),
        *((f"the teacher {name} has other weights or preprocessing, another configuration or tokenizer", *digests)
          for name, *digests in of_teachers),
        *((f"the loss term {name} has other code", *digests) for name, *digests in of_terms),
        *((meaning, getattr(old, name), getattr(new, name)) for name, meaning in _MEANINGS.items()),
    ]  # fmt: skip
    for meaning, was, now in changes:
        if was and now and was != now:
            return f"{meaning} (SHA-256 {was[:_SHOWN_DIGITS]} → {now[:_SHOWN_DIGITS]})"
    return None
