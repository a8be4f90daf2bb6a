"""What a run is made from: loaded and checked before anything is written, and known again when it is resumed."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.images import in_bounded_batches
from clip_rd_edge.bundle.labels import is_template
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.bundle.runs import INPUTS_FILE, RUN_CONFIG_FILE, STUDENT_FOLDER, WEIGHTS_FILE, model_folder
from clip_rd_edge.data.load import names_shards
from clip_rd_edge.data.mixed import TrainingData, load_samples
from clip_rd_edge.data.reinforced import STORED, Reinforced, StoredTeachers
from clip_rd_edge.data.samples import BadSamples, Samples, fingerprint, require_batch, require_images
from clip_rd_edge.data.tasks import Task
from clip_rd_edge.data.webdataset import parse_sources
from clip_rd_edge.distillation.checkpoint import list_checkpoints, seed_everything
from clip_rd_edge.distillation.config import LOCATIONS, RecordedConfig, RunConfig, is_texts_alone, plain_values
from clip_rd_edge.distillation.loader import ViewDataset
from clip_rd_edge.distillation.pixels import crops_for
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.quantized import require_quantizable
from clip_rd_edge.distillation.reinforced import ReinforcedDataset, require_stored_width
from clip_rd_edge.distillation.student import make_student, require_named_student, set_training_mode, text_source
from clip_rd_edge.distillation.teacher import (
    ensemble_of,
    ensemble_of_stored,
    load_stored_teachers,
    load_teachers,
)
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.losses.ensemble import Ensemble
from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.losses.terms import find_term, own_terms, source_of
from clip_rd_edge.models.clip import ClipModel, form_fingerprint, model_fingerprint
from clip_rd_edge.models.encoder import BATCH_SIZE, TorchEncoder
from clip_rd_edge.models.names import is_trained, student_file
from clip_rd_edge.runtime.labels import read_texts
from clip_rd_edge.utils.files import sha256_of, write_bytes, write_text
from clip_rd_edge.utils.paths import Typed, is_file
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import read_json, read_yaml, to_json, to_yaml
from clip_rd_edge.utils.text import as_word, shown_source, shown_sources

_SHOWN_DIGITS = 12


class RunInputs(msgspec.Struct, frozen=True, kw_only=True):
    """Fingerprints of data, teacher and trained student, which do not depend on the folders that they lie in.

    Attributes:
        pairs: number of rows, whose image and captions do not always belong together.
        left_out: number of samples that are not pairs, such as those in the lost part of a shard.
        samples: the rows in words; empty for runs of before there were others than pairs.
        teacher_preprocessing: of each teacher, whose fingerprint does not cover it; none for stored teachers and for
            runs that did not record it yet.
        pairs_sha256: see `data.samples.fingerprint`.
        teacher_sha256: see `models.clip.model_fingerprint`; those of several teachers in turn; None without one.
        student_sha256: the same of a trained student that is trained on; None for a new one, and for runs that did not
            record it yet.
        image_weights_sha256, text_weights_sha256: of the file that a tower of the student starts from; None for what is
            no file, for a file that is gone, and for runs that did not record it yet.
        text_sha256: of the text tower and tokenizer that a new student takes from a model's folder; None for others,
            and for runs that did not record it yet.
        student_file_sha256: of the JSON file with a new student's architecture and preprocessing; None for others, and
            for runs that did not record it yet.
        form_sha256: of what a checkpoint's weights belong to: the form of the student and the teachers' embedding
            sizes; None for runs that did not record it yet.
        terms_sha256: of the code of each own loss term of the recipe, by its name.
    """

    pairs: int
    left_out: int
    pairs_sha256: str
    teacher_sha256: str | tuple[str, ...] | None
    samples: str = ""
    teacher_preprocessing: tuple[Preprocessing, ...] = ()
    student_sha256: str | None = None
    image_weights_sha256: str | None = None
    text_weights_sha256: str | None = None
    text_sha256: str | None = None
    student_file_sha256: str | None = None
    form_sha256: str | None = None
    terms_sha256: dict[str, str] = {}


def teachers_digest(inputs: RunInputs) -> str:
    """Return a digest of the teachers and of how they see images, by which their embeddings are known again."""
    return hashlib.sha256(msgspec.json.encode((inputs.teacher_sha256, inputs.teacher_preprocessing))).hexdigest()


def inputs_of(config: RunConfig, setup: RunSetup) -> RunInputs:
    """Return the fingerprints of a run's data and models."""
    teachers = tuple(map(model_fingerprint, setup.teachers))
    if setup.stored is not None:
        teachers = (hashlib.sha256(msgspec.json.encode(setup.stored)).hexdigest(),)
    takes_text = _taken_text(config) is not None  # the student still has the weights that it starts from
    text = replace(setup.student, model=setup.student.model.get_submodule("text")) if takes_text else None
    return RunInputs(
        **_data_inputs(setup.pairs),
        teacher_sha256=teachers if len(teachers) > 1 else teachers[0] if teachers else None,
        teacher_preprocessing=tuple(clip.preprocessing for clip in setup.teachers),
        student_sha256=model_fingerprint(setup.student) if is_trained(config.student) else None,
        image_weights_sha256=_sha256_of_file(config.pretrained_image),
        text_weights_sha256=_sha256_of_file(config.pretrained_text),
        text_sha256=model_fingerprint(text) if text else None,
        student_file_sha256=_student_file_sha256(config),
        form_sha256=_form_of(setup),
        terms_sha256={name: source_of(name) for name in own_terms(config.recipe.objective)},
    )


def _data_inputs(pairs: Samples) -> dict[str, Any]:
    return {
        "pairs": len(pairs),
        "left_out": pairs.problems.count,
        "samples": str(pairs.counts),
        "pairs_sha256": fingerprint(pairs),
    }


def _student_file_sha256(config: RunConfig) -> str | None:
    return sha256_of(file) if (file := student_file(config.student)) else None


def _sha256_of_file(name: str | None) -> str | None:
    return sha256_of(Path(name)) if name and is_file(name) else None


def _form_of(setup: RunSetup) -> str:
    form = (form_fingerprint(setup.student), setup.objective.teacher_widths)
    return hashlib.sha256(msgspec.json.encode(form)).hexdigest()


def _taken_text(config: RunConfig) -> Typed | None:
    """Return the name of the model whose text tower the student has; None also for a student to fine-tune."""
    return None if is_trained(config.student) else text_source(config)


def common_inputs(config: RunConfig, setup: RunSetup, processes: Processes) -> RunInputs:
    """Return the fingerprints of data and models, which must be the same in all processes.

    Machines that do not share their files may hold different ones under the same names.
    """
    with processes.together():
        inputs = inputs_of(config, setup)
    first, *others = processes.gather_objects(inputs)
    for rank, other in enumerate(others, start=1):
        if other != first:
            *fields, last = _described(first)
            field = next((name for name in fields if getattr(other, name) != getattr(first, name)), last)
            raise InputError(
                f"Process {rank} of the run{processes.where(rank)} reads {_described(other)[field]}, but process 0 "
                f"{_described(first)[field]}.",
                hint="give all machines the same data and the same models",
            )
    return first


def check_inputs(
    run: Path,
    inputs: RunInputs,
    config: RunConfig,
    setup: RunSetup,
    *,
    accept_changes: bool,
    reporter: Reporter = SILENT,
) -> None:
    """Check that data and models are those of RUN/inputs.json, if there is one.

    A run without a checkpoint starts again, with whatever is there now, which is recorded. Otherwise, `record_inputs`
    has to follow once the checkpoint is loaded: until then, the run can go on with its earlier inputs.

    Args:
        inputs: fingerprints of data and models.
        config, setup: name them.
        accept_changes: report a difference instead of raising, unless the run is finished, or its student would get
            another tokenizer, architecture or preprocessing, or a teacher another embedding size.
    """
    has_checkpoint = bool(list_checkpoints(run))
    path = run / INPUTS_FILE
    if path.is_file():
        old = read_json(path, RunInputs)
        former = _former_data(run, config, old, inputs)
        difference = _difference_of_run(old, inputs, setup, former=former)
        if difference is None:
            return
        is_finished = is_file(run / STUDENT_FOLDER / WEIGHTS_FILE)
        # The weights of a checkpoint belong to the tokens and the architecture that they were trained with.
        of_student = ("form_sha256", "text_sha256", "student_file_sha256")
        is_same_student = all(getattr(old, name) in (None, getattr(inputs, name)) for name in of_student)
        is_acceptable = not is_finished and is_same_student
        if is_finished or (has_checkpoint and not (accept_changes and is_acceptable)):
            ways = ["name those that it was finished with" if is_finished else "restore them"]
            if former:
                is_shown = shown_source(former) == former
                those = f": {{data}} {as_word(former)}" if is_shown else f", the data in {run / RUN_CONFIG_FILE}"
                ways = [f"name those that it began with{those}"]
            ways.append("start a new run with another {output}")
            if is_acceptable:
                ways.append("go on with the new ones: {accept_changes}")
            raise UsageError(
                f"{run} began with other inputs: {difference}.", hint=f"{', '.join(ways[:-1])}, or {ways[-1]}"
            )
        reporter.note(f"the run goes on with changed inputs: {difference}")
    if not has_checkpoint:
        record_inputs(run, inputs)


def changed_inputs(run: Path, inputs: RunInputs, config: RunConfig, setup: RunSetup) -> str | None:
    """Return in words how data and models differ from those of RUN/inputs.json; None if they do not."""
    old = read_json(run / INPUTS_FILE, RunInputs)
    return _difference_of_run(old, inputs, setup, former=_former_data(run, config, old, inputs))


def require_same_files(configs: Sequence[RunConfig], runs: Sequence[Path], pairs: Samples) -> None:
    """Check that runs began with the data and the students' files that are there now; no model is loaded.

    Args:
        configs: of the runs, all on the same data.
        runs: their folders; those without a checkpoint or a student, which begin again, are left out.
        pairs: the data.
    """
    data = _data_inputs(pairs)
    for config, run in zip(configs, runs, strict=True):
        has_trained = is_file(run / STUDENT_FOLDER / WEIGHTS_FILE) or list_checkpoints(run)
        if not (has_trained and is_file(run / INPUTS_FILE)):
            continue
        old = read_json(run / INPUTS_FILE, RunInputs)
        new = msgspec.structs.replace(old, **data, student_file_sha256=_student_file_sha256(config))
        if difference := _difference(old, new, data=pairs.name, teachers=config.teachers):
            raise UsageError(
                f"{run} began with other inputs: {difference}.", hint="restore them, or choose another {output}"
            )


def record_inputs(run: Path, inputs: RunInputs) -> None:
    """Write RUN/inputs.json: the run has begun with these, or goes on with them."""
    write_bytes(run / INPUTS_FILE, to_json(inputs))


def sources_known_by_content(run: Path, old: RecordedConfig, new: RunConfig) -> frozenset[str]:
    """Return the fields of a run's configuration that RUN/inputs.json decides, whatever path they name.

    A path says little: it may be relative to another working directory, or that of a copy on another machine.

    Args:
        old: the configuration that the run began with.
    """
    if not is_file(run / INPUTS_FILE):
        return frozenset()
    fields = {"terms"}  # the recipe names those that it weighs
    fields |= {
        name for name in ("data", "images", "texts") if (getattr(old, name) is None) is (getattr(new, name) is None)
    }
    templates = (*(str(template.plain()) for template in old.templates), *new.templates)
    if "texts" in fields and not all(map(is_template, templates)):
        fields.add("templates")  # which a file holds; the texts are compared with them
    teachers = old.teacher.plain() if old.teacher else []
    if (len(teachers) if isinstance(teachers, list) else 1) == len(new.teachers):
        fields |= {"teacher", "teacher_pretrained"}
    inputs = read_json(run / INPUTS_FILE, RunInputs)
    weights = {"pretrained_image": inputs.image_weights_sha256, "pretrained_text": inputs.text_weights_sha256}
    fields |= {name for name, sha256 in weights.items() if sha256 and is_file(getattr(new, name) or "")}
    if inputs.text_sha256 and _taken_text(new) is not None:
        fields.add("text")
    if (inputs.student_sha256 and is_trained(new.student)) or (
        inputs.student_file_sha256 and student_file(new.student)
    ):
        fields.add("student")
    return frozenset(fields)


def record_locations(run: Path, config: RunConfig) -> None:
    """Have RUN/config.yaml name the paths that the run reads now."""
    old = plain_values(read_yaml(run / RUN_CONFIG_FILE, RecordedConfig))
    new = {name: value if name in LOCATIONS else old[name] for name, value in plain_values(config).items()}
    if new != old:
        write_text(run / RUN_CONFIG_FILE, to_yaml(new))


def newer_inputs(config: RunConfig, student: Path) -> list[str]:
    """Return the names of the data and models of a run that have been written since its student was.

    Shards and what lies elsewhere are not looked at.
    """
    finished = (student / WEIGHTS_FILE).stat().st_mtime_ns
    text = None if _taken_text(config) is None else config.text
    templates = [name for name in config.templates if not is_template(name)]
    inputs = (config.data, config.images, config.texts, *templates, *config.teachers, config.student, text)
    inputs += config.terms
    names = [name for name in inputs if name]
    return [name for name in dict.fromkeys(names) if _written_ns(name) > finished]


def _written_ns(name: str) -> int:
    """Return when a table or a model was last written, in ns since the epoch; 0 for what is neither."""
    folder = model_folder(name)
    files = [Path(name.removeprefix(STORED))] if folder is None else list(folder.glob("*"))
    return max((file.stat().st_mtime_ns for file in files if is_file(file)), default=0)


def _former_data(run: Path, config: RunConfig, old: RunInputs, new: RunInputs) -> str | None:
    """Return the data that a run was begun with, if `config` names others: neither may have changed since."""
    if old.pairs_sha256 == new.pairs_sha256:
        return None
    recorded = read_yaml(run / RUN_CONFIG_FILE, RecordedConfig).data
    former = str(recorded.plain()) if recorded else None
    return former if former and config.data and _data_name(former) != _data_name(config.data) else None


def _data_name(source: str) -> str:
    return Path(shown_source(source)).name


def _difference_of_run(old: RunInputs, new: RunInputs, setup: RunSetup, *, former: str | None) -> str | None:
    names = setup.teacher_names if setup.stored is None else [" and ".join(setup.teacher_names)]
    return _difference(old, new, data=setup.pairs.name, teachers=names, former=former)


def _difference(
    old: RunInputs, new: RunInputs, *, data: str, teachers: Sequence[str], former: str | None = None
) -> str | None:
    if change := _change(old.text_sha256, new.text_sha256):
        return f"the text tower that the student starts from has other weights or another tokenizer ({change})"
    if change := _change(old.student_file_sha256, new.student_file_sha256):
        return f"the file of the student's architecture has another content ({change})"
    if former and (change := _change(old.pairs_sha256, new.pairs_sha256)):
        other = f"as many, but other names, captions, sizes or another order ({change})"
        has = other if _counts(old) == _counts(new) else _counts(new)
        return f"{_data_name(former)} with {_counts(old)}, where {data} has {has}"
    if (old.pairs, old.left_out) != (new.pairs, new.left_out):
        return f"{data} had {_counts(old)}, and now has {_counts(new)}"
    if change := _change(old.pairs_sha256, new.pairs_sha256):
        return f"{data} still has {_counts(new)}, but other names, captions, sizes or another order ({change})"
    before, after = _all_of(old.teacher_sha256), _all_of(new.teacher_sha256)
    if len(before) != len(after):
        return f"there were {len(before)} teachers, and now {len(after)}"
    for name, was, now in zip(teachers, before, after, strict=True):
        if change := _change(was, now):
            return f"the teacher {name} has other weights, another configuration or another tokenizer ({change})"
    # A run that an older version began did not record it.
    for name, seen, sees in zip(teachers, old.teacher_preprocessing, new.teacher_preprocessing, strict=False):
        if seen != sees:
            return f"the teacher {name} has other preprocessing of images"
    if change := _change(old.student_sha256, new.student_sha256):
        return f"the model that it trains on has other weights, another configuration or another tokenizer ({change})"
    if change := _change(old.image_weights_sha256, new.image_weights_sha256):
        return f"the image weights that the student starts from are others ({change})"
    if change := _change(old.text_weights_sha256, new.text_weights_sha256):
        return f"the text weights that the student starts from are others ({change})"
    for name, was in old.terms_sha256.items():
        if change := _change(was, new.terms_sha256.get(name)):
            return f"the loss term {name} has other code ({change})"
    if change := _change(old.form_sha256, new.form_sha256):
        return f"the student has another architecture, tokenizer or preprocessing ({change})"
    return None


def _all_of(teacher_sha256: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return teacher_sha256 if isinstance(teacher_sha256, tuple) else (teacher_sha256,) if teacher_sha256 else ()


def _counts(inputs: RunInputs) -> str:
    left_out = f" and {inputs.left_out:,} samples that are not pairs" if inputs.left_out else ""
    return f"{inputs.samples or f'{inputs.pairs:,} pairs'}{left_out}"


def _described(inputs: RunInputs) -> dict[str, str]:
    """Return what a process reads, in words, by the name of the fingerprint that tells it from other processes'."""
    digests = _all_of(inputs.teacher_sha256)
    teachers = "teachers" if len(digests) > 1 else "a teacher"
    preprocessing = msgspec.json.encode(inputs.teacher_preprocessing).decode()
    return {
        "teacher_sha256": f"{teachers} with the {' and '.join(map(_digest, digests))}",
        "teacher_preprocessing": f"a teacher with the preprocessing {preprocessing}",
        "student_sha256": f"a trained student with the {_digest(inputs.student_sha256 or '')}",
        "image_weights_sha256": f"image weights with the {_digest(inputs.image_weights_sha256 or '')}",
        "text_weights_sha256": f"text weights with the {_digest(inputs.text_weights_sha256 or '')}",
        "text_sha256": f"a text tower to start from with the {_digest(inputs.text_sha256 or '')}",
        "student_file_sha256": f"a file of the student with the {_digest(inputs.student_file_sha256 or '')}",
        "terms_sha256": f"loss terms with the {' and '.join(map(_digest, inputs.terms_sha256.values()))}",
        "form_sha256": f"a student whose form has the {_digest(inputs.form_sha256 or '')}",
        "pairs_sha256": f"{_counts(inputs)} with the {_digest(inputs.pairs_sha256)}",
    }


def _digest(sha256: str) -> str:
    return f"SHA-256 {sha256[:_SHOWN_DIGITS]}"


def _change(old: str | None, new: str | None) -> str | None:
    """Return from what to what a digest changed; None if it did not, or if either is not recorded."""
    return f"{_digest(old)} → {new[:_SHOWN_DIGITS]}" if old and new and old != new else None


@dataclass(frozen=True)
class RunSetup:
    """Samples, models and objective of a run. There are no `teachers` if the objective does not need one.

    With `stored` teachers, the pairs are `Reinforced`, which have the embeddings, and there are no other teachers.
    `ensemble` says how the embeddings of either become those of one; None without a teacher.

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
        from clip_rd_edge.benchmarking.accuracy import task_fingerprint  # which most runs do without

        return {task.name: task_fingerprint(task) for task in self.tasks}

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
    require_quantizable(config)
    with processes.main_first():
        require_named_student(config)
        pairs = training_pairs(config, reporter=reporter)
    with processes.together():  # a machine may lack a file that the others have
        setup = _load_models(config, pairs, name=name, processes=processes, reporter=reporter)
    return setup


def _load_models(config: RunConfig, pairs: Samples, *, name: str, processes: Processes, reporter: Reporter) -> RunSetup:
    BadSamples(pairs, max_share=config.max_bad)  # refuses too many before the models are loaded
    if count := pairs.problems.count:
        lost = f", and about {pairs.problems.lost:,} are lost in damaged shards" if pairs.problems.lost else ""
        left_out = f"{count:,} samples are not pairs and were" if count > 1 else "1 sample is not a pair and was"
        reporter.note(f"{left_out} skipped{lost}; the first: {pairs.problems.examples[0]}")
    require_batch(pairs, config.recipe.batch_size, processes=processes.world_size)
    if is_texts_alone(config):
        _require_terms_of_texts(config)
        if config.store is not None:
            require_images(pairs)
    elif not pairs.counts.pairs:
        _require_terms_without_pairs(config)
    stored = load_stored_teachers(config)
    if stored is not None and isinstance(pairs, Reinforced):
        require_stored_width(pairs, stored)
    teachers = load_teachers(config)
    ensemble = ensemble_of_stored(stored) if stored else ensemble_of(teachers) if teachers else None
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


def _require_terms_without_pairs(config: RunConfig) -> None:
    if config.recipe.objective.needs_pairs:
        raise UsageError(
            f"The recipe {config.recipe_name} trains on pairs of images and captions alone, of which there are none.",
            hint="name pairs with {data}, or another recipe: {recipe} clip-rd",
        )


def _require_terms_of_texts(config: RunConfig) -> None:
    if not config.recipe.objective.for_texts():
        raise UsageError(
            f"The recipe {config.recipe_name} trains on images, of which there are none.",
            hint="name some: {images} FOLDER, or {data} PAIRS; or another recipe: {recipe} clip-rd",
        )
    if config.quantize:
        raise UsageError(
            "There are texts alone, but it is the image tower that is trained for INT8.",
            hint="name images: {images} FOLDER, or {data} PAIRS",
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
    """Return what a run trains on; raises as `data.mixed.load_samples`."""
    source = TrainingData(**{name: getattr(config, name) for name in TrainingData.__struct_fields__})
    if load_stored_teachers(config) is not None:
        return _reinforced_pairs(source, reporter)
    return load_samples(source, read_texts, reporter=reporter)


def _reinforced_pairs(source: TrainingData, reporter: Reporter) -> Reinforced:
    if source.data is None or not names_shards(source.data):
        raise UsageError(
            f"Stored teachers were named, but the data are {shown_sources(source.data)}; expected WebDataset shards of "
            "reinforced samples.",
            hint="{data} 'store/{00000..00012}.tar', or name another {teacher}",
        )
    sources = parse_sources(source.data, source.train_data_upsampling_factors)
    return Reinforced(source.data, sources, json_key=source.json_caption_key, reporter=reporter)


def make_dataset(config: RunConfig, setup: RunSetup, *, with_teacher_pixels: bool = True) -> ViewDataset:
    """Return the data set of views that a run trains on."""
    if setup.stored is not None:
        assert isinstance(setup.pairs, Reinforced)
        return ReinforcedDataset(
            setup.pairs,
            setup.stored,
            setup.student.preprocessing,
            seed=config.seed,
            views=config.views,
            max_bad=config.max_bad,
        )
    return ViewDataset(
        setup.pairs,
        setup.student.preprocessing,
        [teacher.preprocessing for teacher in setup.teachers] if with_teacher_pixels else [],
        crops=crops_for(setup.student.preprocessing, config.recipe.crop_scale),
        seed=config.seed,
        views=config.views,
        max_bad=config.max_bad,
    )


RECORDED_PACKAGES = ("clip-rd-edge", "torch", "open_clip_torch", "timm", "numpy", "pillow")
_HISTOGRAM_PAIRS = 512


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


def histogram_embeddings(config: RunConfig, setup: RunSetup) -> dict[str, tuple[Embeddings, Embeddings]]:
    """Embed up to 512 random pairs with student and teachers: image and text embeddings, (N, D) each, by model.

    Stored teachers are left out: their embeddings are those of other crops. Several teachers are one, see
    `losses.ensemble`. Empty if there are no pairs.
    """
    indices = np.random.default_rng(0).permutation(setup.pairs.counts.pairs)[:_HISTOGRAM_PAIRS]
    if not len(indices):
        return {}
    bad = BadSamples(setup.pairs, max_share=1)  # the training has refused too many; a plot refuses no trained student
    captions = list[str]()

    def images() -> Iterator[Image.Image]:
        for index in indices.tolist():
            image, own = bad.take(index)
            captions.append(own[0])
            yield image

    encoders = [TorchEncoder(clip) for clip in (setup.student, *(setup.teachers if setup.ensemble else ()))]
    parts = [list[Embeddings]() for _ in encoders]
    for batch in in_bounded_batches(images(), BATCH_SIZE):
        for part, encoder in zip(parts, encoders, strict=True):
            part.append(encoder.encode_images(batch))
        del batch  # before the next images are opened
    sides = [[np.concatenate(part) for part in parts], [encoder.encode_texts(captions) for encoder in encoders]]
    embeddings = {"student": (sides[0][0], sides[1][0])}
    if setup.teachers and setup.ensemble:
        image, text = (setup.ensemble.join([torch.from_numpy(part) for part in side[1:]]).numpy() for side in sides)
        embeddings["teacher"] = (image, text)
    return embeddings
