"""Fingerprints of what a run reads from outside its folder, so that a resumed run notices when it was replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.bundle.runs import INPUTS_FILE, RUN_CONFIG_FILE, STUDENT_FOLDER, WEIGHTS_FILE
from clip_rd_edge.data.samples import Samples, fingerprint
from clip_rd_edge.distillation.checkpoint import list_checkpoints
from clip_rd_edge.distillation.config import LOCATIONS, RecordedConfig, RunConfig, plain_values
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.setup import RunSetup
from clip_rd_edge.distillation.student import text_source
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.losses.terms import own_terms, source_of
from clip_rd_edge.models.clip import form_fingerprint, model_fingerprint
from clip_rd_edge.models.names import is_trained, student_file
from clip_rd_edge.utils.files import sha256_of, write_bytes, write_text
from clip_rd_edge.utils.paths import Typed, is_file
from clip_rd_edge.utils.structs import read_json, read_yaml, to_json, to_yaml
from clip_rd_edge.utils.text import SILENT, Reporter, as_word, shown_source

_SHOWN_DIGITS = 12


class RunInputs(msgspec.Struct, frozen=True, kw_only=True):
    """Fingerprints of data, teacher and trained student, which do not depend on the folders that they lie in.

    Attributes:
        left_out: number of samples that are not pairs, such as those in the lost part of a shard.
        samples: how many rows of which kinds, in words.
        pairs_sha256: see `data.samples.fingerprint`.
        teacher_sha256: see `models.clip.model_fingerprint`, of each teacher.
        teacher_preprocessing: of each teacher, whose fingerprint does not cover it; none for stored teachers.
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
    teacher_preprocessing: tuple[Preprocessing, ...] = ()
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
    return hashlib.sha256(msgspec.json.encode((inputs.teacher_sha256, inputs.teacher_preprocessing))).hexdigest()


def inputs_of(config: RunConfig, setup: RunSetup) -> RunInputs:
    """Return the fingerprints of a run's data and models."""
    teachers = tuple(map(model_fingerprint, setup.teachers))
    if setup.stored is not None:
        teachers = (hashlib.sha256(msgspec.json.encode(setup.stored)).hexdigest(),)
    takes_text = _taken_text(config) is not None  # the student still has the weights that it starts from
    text = replace(setup.student, model=setup.student.model.get_submodule("text")) if takes_text else None
    form = form_fingerprint(setup.student), setup.objective.teacher_widths
    return RunInputs(
        **_data_inputs(setup.pairs),
        teacher_sha256=teachers,
        teacher_preprocessing=tuple(clip.preprocessing for clip in setup.teachers),
        student_sha256=model_fingerprint(setup.student) if is_trained(config.student) else None,
        image_weights_sha256=_sha256_of_file(config.pretrained_image),
        text_weights_sha256=_sha256_of_file(config.pretrained_text),
        text_sha256=model_fingerprint(text) if text else None,
        student_file_sha256=_sha256_of_file(student_file(config.student)),
        form_sha256=hashlib.sha256(msgspec.json.encode(form)).hexdigest(),
        terms_sha256={name: source_of(name) for name in own_terms(config.recipe.objective)},
    )


def _data_inputs(pairs: Samples) -> dict[str, Any]:
    return {"left_out": pairs.problems.count, "samples": str(pairs.counts), "pairs_sha256": fingerprint(pairs)}


def _sha256_of_file(name: str | Path | None) -> str | None:
    return sha256_of(Path(name)) if name and is_file(name) else None


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
        if difference := _difference(first, other, data=setup.pairs.name, teachers=setup.teacher_names):
            raise InputError(
                f"Process {rank} of the run{processes.where(rank)} reads other files than process 0: {difference}.",
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
    if is_file(run / INPUTS_FILE):
        old = read_json(run / INPUTS_FILE, RunInputs)
        difference = _difference(old, inputs, data=setup.pairs.name, teachers=setup.teacher_names)
        if difference is None:
            return
        is_finished = is_file(run / STUDENT_FOLDER / WEIGHTS_FILE)
        is_acceptable = not is_finished and all(getattr(old, name) == getattr(inputs, name) for name in _OF_STUDENT)
        if is_finished or (has_checkpoint and not (accept_changes and is_acceptable)):
            former = _former_data(run, config) if old.pairs_sha256 != inputs.pairs_sha256 else ""
            ways = [f"name those that it began with: {former}" if former else "restore them"]
            ways += ["start a new run with another {output}"]
            ways += ["go on with the new ones: {accept_changes}"] * is_acceptable
            raise UsageError(f"{run} began with other inputs: {difference}.", hint=", or ".join(ways))
        reporter.note(f"the run goes on with changed inputs: {difference}")
    if not has_checkpoint:
        record_inputs(run, inputs)


def _former_data(run: Path, config: RunConfig) -> str:
    """Return the data that a run was begun with as an option, if `config` names others."""
    recorded = read_yaml(run / RUN_CONFIG_FILE, RecordedConfig).data
    former = str(recorded.plain()) if recorded else ""
    if not (former and config.data) or Path(shown_source(former)).name == Path(shown_source(config.data)).name:
        return ""
    # An address may hold a secret.
    return f"{{data}} {as_word(former)}" if shown_source(former) == former else f"the data in {run / RUN_CONFIG_FILE}"


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
        new = msgspec.structs.replace(old, **data, student_file_sha256=_sha256_of_file(student_file(config.student)))
        if difference := _difference(old, new, data=pairs.name, teachers=config.teachers):
            raise UsageError(
                f"{run} began with other inputs: {difference}.", hint="restore them, or choose another {output}"
            )


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


def _difference(old: RunInputs, new: RunInputs, *, data: str, teachers: Sequence[str]) -> str | None:
    """Return in words what differs, and how; None if nothing does."""
    for name in ("text_sha256", "student_file_sha256"):
        if change := _change(getattr(old, name), getattr(new, name)):
            return f"{_MEANINGS[name]} ({change})"
    if old.counts != new.counts:
        return f"{data} has {new.counts}, in place of {old.counts}"
    if change := _change(old.pairs_sha256, new.pairs_sha256):
        return f"{data} has as many samples, but other names, captions, sizes or another order ({change})"
    if len(old.teacher_sha256) != len(new.teacher_sha256):
        return f"there are {len(new.teacher_sha256)} teachers, in place of {len(old.teacher_sha256)}"
    for name, was, now in zip(_each(teachers, old), old.teacher_sha256, new.teacher_sha256, strict=True):
        if change := _change(was, now):
            return f"the teacher {name} has other weights, another configuration or another tokenizer ({change})"
    for name, seen, sees in zip(teachers, old.teacher_preprocessing, new.teacher_preprocessing, strict=False):
        if seen != sees:
            return f"the teacher {name} has other preprocessing of images"
    for name, was in old.terms_sha256.items():
        if change := _change(was, new.terms_sha256.get(name)):
            return f"the loss term {name} has other code ({change})"
    for name, meaning in _MEANINGS.items():
        if change := _change(getattr(old, name), getattr(new, name)):
            return f"{meaning} ({change})"
    return None


def _each(teachers: Sequence[str], inputs: RunInputs) -> Sequence[str]:
    """Return a name for each fingerprint of teachers: stored ones have one together."""
    return teachers if len(teachers) == len(inputs.teacher_sha256) else [" and ".join(teachers)]


def _change(old: str | None, new: str | None) -> str | None:
    """Return from what to what a digest changed; None if it did not, or if there was or is none, as for a lost file."""
    return f"SHA-256 {old[:_SHOWN_DIGITS]} → {new[:_SHOWN_DIGITS]}" if old and new and old != new else None
