"""Configuration of a run: the recipe (how to train), and the models and data (what to train, on what)."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta

from clip_rd_edge.bundle.labels import is_template
from clip_rd_edge.bundle.manifest import MAX_EMBEDDING_SIZE
from clip_rd_edge.bundle.preprocess import MAX_EDGE
from clip_rd_edge.bundle.runs import LOCAL_DIR, model_folder
from clip_rd_edge.bundle.tokenizer import MAX_CONTEXT
from clip_rd_edge.data.load import names_shards
from clip_rd_edge.data.reinforced import STORED
from clip_rd_edge.data.remote import is_remote
from clip_rd_edge.data.webdataset import SEPARATOR
from clip_rd_edge.errors import ConfigError, UsageError, near_matches, quoted
from clip_rd_edge.losses.logits import PUBLISHED_START, ScaleKind
from clip_rd_edge.losses.objective import Weights
from clip_rd_edge.losses.terms import find_term, term_names
from clip_rd_edge.models.students import TEACHER
from clip_rd_edge.models.text_weights import TOKENS
from clip_rd_edge.utils.paths import AnyPath, Recorded, Typed, as_text, exists, is_file
from clip_rd_edge.utils.structs import (
    CheckedError,
    CheckedStruct,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    comment_lines,
    commented_yaml,
    convert,
    read_yaml,
)
from clip_rd_edge.utils.text import shown_sources

RECIPES = Path(__file__).parent / "recipes"
RECIPE_SUFFIXES = (".yaml", ".yml")  # of recipes that are files of the user's own
# Fields that may change when a run is resumed: they affect output or speed, but no batch and no loss.
CHANGEABLE_ON_RESUME = frozenset((
    "log_every", "checkpoint_every", "evaluate_every", "tasks", "report_to", "workers", "max_bad", "store",
    "processes",
))  # fmt: skip
# Fields that say where something lies, which may differ between machines; their content is compared instead.
LOCATIONS = frozenset((
    "recipe_name", "data", "images", "texts", "templates", "teacher", "teacher_pretrained", "student", "text",
    "pretrained_image", "pretrained_text", "store", "tasks",
))  # fmt: skip
CROP_SCALE = (0.9, 1.0)  # of recipes that name no other
MAX_WORKERS = 1_024  # loader processes
MAX_BANK_SIZE = 2**24  # rows; of 512 dimensions, 32 GiB
_Decay = Annotated[float, Meta(ge=0, lt=1)]
Seed = Annotated[int, Meta(ge=0, lt=2**32)]  # what numpy accepts
Precision = Literal["auto", "fp32", "bf16", "fp16"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]
# Defaults that `quantize` puts in place of the recipe's values: a short fine-tuning run, in float32 because only
# float32 represents INT8's steps exactly.
QUANTIZE_DEFAULTS: dict[str, Any] = {"steps": 300, "learning_rate": 1e-4, "precision": "fp32"}


class Recipe(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train.

    Attributes:
        objective: weight of each loss term; 0 leaves it out.
        scales: `bounded` keeps the learned multipliers of VRD and XRD in [1, 100], `raw` learns them as published.
        scale_start: initial value of these multipliers.
        bank_size: max number of the teacher's image embeddings, and of its caption embeddings, in the bank of the term
            `bank`; see `distillation.bank`.
        bank_temperature: divides the teacher's logit scale in that term; higher values bring more distant entries in.
        epochs: passes over the pairs; ignored if `steps` is not 0.
        steps: number of training steps; 0 follows `epochs`.
        batch_size: pairs per step, over all processes.
        learning_rate: peak value, after a linear warm-up; then cosine decay to 0.
        warmup_steps: steps of the warm-up, at most a tenth of the run.
        weight_decay: for matrices and kernels; biases, norms and the student's logit scale are not decayed.
        scales_weight_decay: for the objective's own parameters.
        betas, epsilon: of AdamW.
        clip_gradient_norm: max norm of the gradients; 0 disables clipping.
        crop_scale: min and max share that a training crop keeps of the largest box of its shape.
        ema_decay: max decay of an exponential moving average of the weights, which is then evaluated and saved; 0 saves
            the weights themselves.
        precision: `auto` times a few steps in float32 and bfloat16, on a CUDA device also in float16, and takes the
            fastest; `fp16` scales the loss.
    """

    objective: Weights
    scales: ScaleKind = "bounded"
    scale_start: PositiveFloat = PUBLISHED_START
    bank_size: Annotated[int, Meta(ge=1, le=MAX_BANK_SIZE)] = 65_536
    bank_temperature: PositiveFloat = 1.0
    epochs: PositiveInt = 32
    steps: NonNegativeInt = 0
    batch_size: PositiveInt = 1024
    learning_rate: PositiveFloat = 1e-3
    warmup_steps: NonNegativeInt = 10_000
    weight_decay: NonNegativeFloat = 0.1
    scales_weight_decay: NonNegativeFloat = 0.01
    betas: tuple[_Decay, _Decay] = (0.9, 0.98)
    epsilon: PositiveFloat = 1e-6
    clip_gradient_norm: NonNegativeFloat = 0.0
    crop_scale: tuple[float, float] = CROP_SCALE
    ema_decay: _Decay = 0.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise CheckedError(f"crop_scale is [{low}, {high}]; expected 0 < min <= max <= 1")


Place = TypeVar("Place")  # of data, a model or a task
Names = TypeVar("Names")  # one place or several


class _Config(CheckedStruct, Generic[Place, Names], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of a run.

    Attributes:
        data, images, texts, templates: what to train on; see `data.mixed.TrainingData`.
        csv_img_key, csv_caption_key: column names of tables, of tasks, too.
        train_data_upsampling_factors, json_caption_key: for shards; `weights` and `json_key` of `load_pairs`.
        max_bad: max fraction of the samples that may be unreadable; these are skipped.
        teacher: as `models.load.load_clip` takes it, or several of them, which `losses.ensemble` makes one; or
            `stored:FILE` for the stored embeddings of reinforced samples, see `data.reinforced`; None if the objective
            does not need a teacher.
        teacher_pretrained: weights of teachers that are named by an architecture alone.
        student: a preset, a timm architecture or a JSON configuration; or `local-dir:PATH` of a model to fine-tune.
        image_size: edge of the student's input in pixels. None, here and for the next two: that of a trained student,
            or the default of a new one, see `distillation.student.with_default_shape`.
        text: see `models.students.text_size`; or the folder of a model, whose text tower the student takes; or
            `teacher` for that of the teacher, or of the first, which then needs `freeze_text`: its features are
            computed once per caption.
        context_length: tokens per caption; with the text tower of a model, that of this model.
        embedding_size: the student's; 0 takes that of all teachers side by side (with the text tower of one of them,
            its own), or 512 without a teacher. If it differs from the teachers', the objective learns projections
            between the two, which are not part of the student.
        pretrained_image, pretrained_text: initial weights of the towers; see `models.students` and
            `models.text_weights`.
        teacher_precision: precision that the teacher computes in; `auto` measures it separately from the student's.
        store: folder with the teacher's embeddings, which are computed only once; needs `views`.
        views: number of distinct views (crop and caption) of a pair, over which the epochs cycle; 0 draws new ones
            every epoch.
        freeze_text: train only the last projection of the text tower.
        freeze_text_layers: number of groups of layers of the text tower, from the input, that are not trained; see
            `models.text_towers.text_groups`.
        freeze_image: number of groups of layers of the image tower, from the input, that are not trained; see
            `distillation.student`.
        freeze_norms: keep the statistics of the batch norms; their scales and biases are trained.
        tuned_share: share of the trained weights in the saved student; the rest are those that a student to fine-tune
            started from. See `models.edit`.
        quantize: fine-tune a trained student for static INT8; see `distillation.quantized`.
        compile: run the student's towers through torch.compile.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        accumulate: number of chunks in which a process's part of a batch passes through the towers of student and
            teacher, to save memory.
        loss_block: pairs per block of the objective, to save memory; 0 takes all of a process's pairs at once.
        global_logits: with several processes, each computes the loss of all pairs rather than of its own.
        processes: number of processes that share a batch, as started by torchrun. It may change when the run is
            resumed: batches and loss stay the same, but batch norms and dropout see only each process's part.
        workers: loader processes; -1 uses half of the cores, at most 8.
        evaluate_every: steps between evaluations on `tasks`; 0 evaluates only at the end.
        report_to: where the metrics also go; see `distillation.trackers`.
    """

    recipe_name: Place
    recipe: Recipe
    data: Place | None = None
    images: Place | None = None
    texts: Place | None = None
    templates: tuple[Place, ...] = ()
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    train_data_upsampling_factors: str | None = None
    json_caption_key: str | None = None
    max_bad: Share = 0.01
    teacher: Names | None = None
    teacher_pretrained: Place | None = None
    student: Place
    image_size: Annotated[int, Meta(ge=1, le=MAX_EDGE)] | None = None
    text: Place | None = None
    context_length: Annotated[int, Meta(ge=2, le=MAX_CONTEXT)] | None = None
    embedding_size: Annotated[int, Meta(ge=0, le=MAX_EMBEDDING_SIZE)] = 0
    pretrained_image: Place | None = None
    pretrained_text: Place | None = None
    teacher_precision: Precision = "auto"
    store: Place | None = None
    views: NonNegativeInt = 0
    freeze_text: bool = False
    freeze_text_layers: NonNegativeInt = 0
    freeze_image: NonNegativeInt = 0
    freeze_norms: bool = False
    tuned_share: Share = 1.0
    quantize: Literal["int8"] | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    accumulate: PositiveInt = 1
    loss_block: NonNegativeInt = 0
    global_logits: bool = False
    processes: PositiveInt = 1
    seed: Seed = 0
    workers: Annotated[int, Meta(ge=-1, le=MAX_WORKERS)] = -1
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 500
    evaluate_every: NonNegativeInt = 0
    tasks: tuple[Place, ...] = ()
    report_to: TrackerName | None = None


class RecordedConfig(_Config[Recorded, Recorded], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run's config.yaml says, perhaps a stranger's: its places are compared, and never opened."""


class RunConfig(_Config[Typed, Typed | tuple[Typed, ...]], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Complete configuration of a run, as it was asked for; saved as `config.yaml`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text == TEACHER and not self.freeze_text:
            raise CheckedError("text is teacher, but freeze_text is false; expected true: this tower is kept as it is")
        if self.text == TEACHER and self.freeze_text_layers:
            raise CheckedError(
                f"text is teacher, whose tower is kept as it is, but freeze_text_layers is {self.freeze_text_layers}; "
                "expected 0"
            )
        if self.freeze_text and self.freeze_text_layers:
            raise CheckedError(
                f"freeze_text is true, and freeze_text_layers is {self.freeze_text_layers}; expected one of them: the "
                "first freezes all layers"
            )
        if self.text == TEACHER and self.pretrained_text:
            raise CheckedError(
                f"text is teacher, which has weights, but pretrained_text is {self.pretrained_text}; expected none"
            )
        if self.stored_teachers and (problem := self._problem_with_stored_teachers()):
            raise CheckedError(f"the teacher is {STORED}, but {problem}: the embeddings of the shards in data are used")
        places = list(map(_place, self.teachers))
        for name, place in zip(self.teachers, places, strict=True):
            if places.count(place) > 1:
                raise CheckedError(f"the teacher {name} is named {places.count(place)} times; expected once")

    @property
    def teachers(self) -> tuple[Typed, ...]:
        """The names of all teachers."""
        return self.teacher if isinstance(self.teacher, tuple) else (self.teacher,) if self.teacher else ()

    @property
    def stored_teachers(self) -> Typed | None:
        """The file that describes the teachers of reinforced samples in `data`; None if the teachers are models."""
        stored = [name for name in self.teachers if name.startswith(STORED)]
        return Typed(stored[0].removeprefix(STORED)) if stored else None

    def _problem_with_stored_teachers(self) -> str:
        if len(self.teachers) > 1:
            return "there are others"
        if self.data is None or self.images is not None or self.texts is not None:
            return "the run is not on data alone"
        if self.store is not None:
            return f"store is {self.store}"
        if self.text == TEACHER or self.pretrained_text in (TEACHER, TOKENS):
            return "its text tower is asked for"
        if self.pretrained_image == TEACHER:
            return "its image tower is asked for"
        return ""


def is_texts_alone(config: RunConfig) -> bool:
    """Return whether a run trains on texts without any images, and so trains no image tower."""
    return config.data is None and config.images is None


_RECIPE_OPTIONS = ("epochs", "steps", "batch_size", "learning_rate", "precision", "ema_decay")


def resolve(
    recipe: AnyPath,
    *,
    data: AnyPath | None = None,
    student: AnyPath,
    teacher: AnyPath | Sequence[AnyPath] | None = None,
    **options: Any,
) -> RunConfig:
    """Return the configuration of a run: a recipe, overridden by the options. Paths may be texts or path objects."""
    recipe = os.fspath(recipe)
    given = {**options, "data": data, "student": student, "teacher": teacher}
    fields: dict[str, Any] = {name: as_text(value) for name, value in given.items()}
    for name in ("tasks", "templates"):
        names = fields.get(name)
        if isinstance(names, (str, tuple, list)):
            fields[name] = (names,) if isinstance(names, str) else tuple(map(as_text, names))
    if isinstance(teacher, (tuple, list)):
        names = tuple(map(as_text, teacher))
        fields["teacher"] = names if len(names) > 1 else names[0] if names else None
    overrides = {name: value for name in _RECIPE_OPTIONS if (value := fields.pop(name, None)) is not None}
    if "epochs" in overrides and overrides.get("steps"):
        raise UsageError(
            f"{overrides['epochs']} epochs and {overrides['steps']} steps were both asked for; expected one of them.",
            hint="omit {epochs} or {steps}",
        )
    if "epochs" in overrides:
        overrides["steps"] = 0
    if "precision" in overrides:
        fields["teacher_precision"] = overrides["precision"]
    if fields.get("text") == TEACHER:
        fields["freeze_text"] = True
    if fields.get("quantize"):
        overrides = {**QUANTIZE_DEFAULTS, **overrides}
    loaded = load_recipe(recipe)
    batch_size = overrides.get("batch_size")
    # An invalid batch size is reported by `convert`.
    if isinstance(batch_size, int) and batch_size > 0 and "learning_rate" not in overrides:
        overrides["learning_rate"] = scaled_learning_rate(loaded, batch_size)
    raw = {
        **fields,
        "recipe_name": recipe,
        "recipe": {**msgspec.to_builtins(loaded), **overrides},
    }
    return convert(raw, RunConfig, source="The run")


def scaled_learning_rate(recipe: Recipe, batch_size: int) -> float:
    """Return a recipe's learning rate for another batch size: proportional to its square root.

    With Adam, this keeps the noise of the updates per pair the same (Malladi et al. 2022). Three significant digits.
    """
    return float(f"{recipe.learning_rate * math.sqrt(batch_size / recipe.batch_size):.3g}")


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def describe_recipes() -> str:
    """Return one line per shipped recipe: its name and its description, the first comment of its file."""
    lines = [(name, _description(RECIPES / f"{name}.yaml")) for name in recipe_names()]
    return "".join(f"{name:14} {description}\n" for name, description in lines)


def _description(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def commented_recipe(name: str) -> str:
    """Return a recipe with all its keys as commented YAML; raises as `load_recipe`."""
    recipe = load_recipe(name)
    shipped = RECIPES / f"{name}.yaml"
    heading = comment_lines(_description(shipped)) if is_file(shipped) else []
    usage = "# Use a copy with: clip-rd-edge distill --recipe COPY.yaml …"
    lines = ["objective:"]
    for term in term_names():
        lines += comment_lines((find_term(term).compute.__doc__ or term).split("\n")[0], indent="  ")
        lines.append(f"  {term}: {recipe.objective.get(term, 0.0)}")
    text = commented_yaml(msgspec.structs.replace(recipe, objective=Weights()))
    return "\n".join([*heading, usage, "", text.replace("objective: {}", "\n".join(lines))])


def load_recipe(name: str) -> Recipe:
    """Load a recipe by name, or from a YAML file of the same form."""
    path = Path(name) if name.endswith(RECIPE_SUFFIXES) else RECIPES / f"{name}.yaml"
    if not is_file(path) and path.parent == RECIPES:
        raise ConfigError(
            f"There is no recipe {quoted(name)}.{near_matches(name, recipe_names())}",
            hint=f"one of {', '.join(recipe_names())}, or a YAML file: clip-rd-edge recipe show clip-rd > mine.yaml",
        )
    return read_yaml(path, Recipe)


def first_difference(
    old: RunConfig | RecordedConfig, new: RunConfig, *, ignored: Collection[str] = CHANGEABLE_ON_RESUME
) -> str | None:
    """Return the first difference as `key: old → new`, or None; a resumed run ignores CHANGEABLE_ON_RESUME.

    Two names of one file or folder, such as a relative and an absolute path, are no difference; nor are two recipe
    files, since what they say is compared.
    """
    old_fields = _flatten(old)
    if str(old_fields["recipe_name"]).endswith(RECIPE_SUFFIXES) and new.recipe_name.endswith(RECIPE_SUFFIXES):
        ignored = {*ignored, "recipe_name"}
    for key, value in _flatten(new).items():
        old_value = old_fields.get(key)
        if key not in ignored and old_value != value and not (key in LOCATIONS and _is_same_place(old_value, value)):
            return f"{key}: {shown_sources(old_value)} → {shown_sources(value)}"
    return None


def _is_same_place(old: object, new: object) -> bool:
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        return len(old) == len(new) and all(map(_is_same_place, old, new))
    return isinstance(old, str) and isinstance(new, str) and _absolute(old) in (_absolute(new), _place(Typed(new)))


def _absolute(name: str) -> str:
    """Return a place as an absolute path, by its text alone: what a file records is not looked for."""
    parts = name.split(SEPARATOR) if names_shards(name) else [name]
    paths = (part.removeprefix(LOCAL_DIR).removeprefix(STORED) for part in parts)
    return SEPARATOR.join(path if is_remote(path) else os.path.abspath(path) for path in paths)  # noqa: PTH100


def _place(name: Typed) -> str:
    """Return the absolute path of the file, the folder or the shards that a name leads to, or else the name."""
    if names_shards(name):
        return SEPARATOR.join(part if is_remote(part) else str(Path(part).resolve()) for part in name.split(SEPARATOR))
    if is_template(name):
        return name  # a sentence, which may be too long for a path
    path = model_folder(name) or Path(name.removeprefix(STORED))
    return str(path.resolve()) if exists(path) else name


def plain_values(config: RunConfig | RecordedConfig) -> dict[str, Any]:
    """Return a configuration as the texts, numbers, lists and dicts of config.yaml."""
    values: dict[str, Any] = msgspec.to_builtins(config, enc_hook=Recorded.plain)
    return values


def _flatten(config: RunConfig | RecordedConfig) -> dict[str, object]:
    fields = plain_values(config)
    recipe = fields.pop("recipe")
    objective = recipe.pop("objective")
    return {**fields, **recipe, **{f"objective.{name}": weight for name, weight in objective.items()}}
