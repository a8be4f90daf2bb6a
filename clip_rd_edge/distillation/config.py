"""How a run is configured: the recipe (how to train), and the settings of `distill` (on what, and what to train)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from clip_rd_edge.errors import ConfigError, UsageError, near_matches, quoted
from clip_rd_edge.losses.objective import PUBLISHED_START, ScaleKind, Weights
from clip_rd_edge.losses.terms import find_term, load_terms, term_names
from clip_rd_edge.models.students import TEACHER
from clip_rd_edge.settings.options import declared, option
from clip_rd_edge.settings.training import Names, Place, Several, Training
from clip_rd_edge.utils.paths import AnyPath, Recorded, Typed, as_text, is_file, several
from clip_rd_edge.utils.structs import (
    CheckedStruct,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    comment_lines,
    commented_yaml,
    convert,
    read_yaml,
)
from clip_rd_edge.utils.text import shown_sources

RECIPES = Path(__file__).parent / "recipes"
STORED = "stored:"  # before the path of a file of `reinforced.StoredTeachers`, in the place of a teacher
RECIPE_SUFFIXES = (".yaml", ".yml")  # of recipes that are files of the user's own
CROP_SCALE = (0.9, 1.0)  # of recipes that name no other
MAX_BANK_SIZE = 2**24  # rows; of 512 dimensions, 32 GiB
_Decay = Annotated[float, Meta(ge=0, lt=1)]
_Share = Annotated[float, Meta(gt=0, le=1)]
Seed = Annotated[int, Meta(ge=0, lt=2**32)]  # what numpy accepts
Precision = Literal["auto", "fp32", "bf16", "fp16"]
TrackerName = Literal["tensorboard", "wandb"]
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
            `bank`; see `distillation.store.make_bank`.
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
    crop_scale: tuple[_Share, _Share] = CROP_SCALE
    ema_decay: _Decay = 0.0
    precision: Precision = "auto"


class _Config(Training[Place, Names, Several], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of a run.

    Attributes:
        recipe_name: of the recipe, or its file.
        teacher_precision: precision that the teacher computes in; `auto` measures it separately from the student's.
        processes: number of processes that share a batch, as started by torchrun. It may change when the run is
            resumed: batches and loss stay the same, but batch norms and dropout see only each process's part.
        log_every: steps between lines of metrics.jsonl.
    """

    recipe_name: Place
    recipe: Recipe
    teacher_precision: Precision = "auto"
    processes: Annotated[int, option("Number of processes.", group="", ge=1, resume="free")] = 1
    log_every: Annotated[int, option("Steps between lines of metrics.jsonl.", group="", ge=1, resume="free")] = 10


class RecordedConfig(
    _Config[Recorded, Recorded, tuple[Recorded, ...]], frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """The content of a run's config.yaml, perhaps a stranger's: its places are compared, and never opened."""


class RunConfig(
    _Config[Typed, Typed | tuple[Typed, ...], tuple[Typed, ...]], frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """Complete configuration of a run, as it was asked for; saved as `config.yaml`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience and not self.evaluate_every:
            raise UsageError("{patience} counts evaluations; expected {evaluate_every}.", option="patience")
        if self.stored_teachers and (len(self.teachers) > 1 or self.images or self.texts or self.store):
            raise UsageError(
                f"The teacher is {STORED}, whose embeddings are in the shards of the data; expected no other teacher, "
                "no images or texts apart and no store.",
                option="teacher",
            )

    @property
    def teachers(self) -> tuple[Typed, ...]:
        return self.teacher if isinstance(self.teacher, tuple) else (self.teacher,) if self.teacher else ()

    @property
    def stored_teachers(self) -> Typed | None:
        """The file that describes the teachers of reinforced samples in `data`; None if the teachers are models."""
        stored = [name for name in self.teachers if name.startswith(STORED)]
        return Typed(stored[0].removeprefix(STORED)) if stored else None


_BY_RESUME = {entry.name: entry.option.resume for entry in declared(RunConfig)}
# Fields that may change when a run is resumed: they affect output or speed, but no batch and no loss.
CHANGEABLE_ON_RESUME = frozenset(name for name, rule in _BY_RESUME.items() if rule == "free")
# Fields that say where something lies, which may differ between machines; their content is compared instead.
LOCATIONS = frozenset((
    "recipe_name", "store", "tasks", *(name for name, rule in _BY_RESUME.items() if rule == "content"),
))  # fmt: skip


def is_texts_alone(config: RunConfig) -> bool:
    """Return whether a run trains on texts without any images, and so trains no image tower."""
    return config.data is None and config.images is None


_RECIPE_OPTIONS = ("epochs", "steps", "batch_size", "learning_rate", "precision", "ema_decay")


def resolve(recipe: AnyPath, *, student: AnyPath, **options: Any) -> RunConfig:
    """Return the configuration of a run: a recipe, overridden by the options. Paths may be texts or path objects.

    This runs what the user has named as loss terms.
    """
    fields: dict[str, Any] = {name: as_text(value) for name, value in {**options, "student": student}.items()}
    for name in ("tasks", "templates", "terms"):
        fields[name] = several(options.get(name, ()))
    teachers = several(options.get("teacher") or ())
    fields["teacher"] = teachers if len(teachers) > 1 else teachers[0] if teachers else None
    overrides = {name: value for name in _RECIPE_OPTIONS if (value := fields.pop(name, None)) is not None}
    if "epochs" in overrides:
        overrides.setdefault("steps", 0)
    if "precision" in overrides:
        fields["teacher_precision"] = overrides["precision"]
    if fields.get("text") == TEACHER:
        fields["freeze_text"] = True
    if fields.get("quantize"):
        overrides = {**QUANTIZE_DEFAULTS, **overrides}
    for source in fields["terms"]:
        load_terms(source)
    name = Typed(os.fspath(recipe))
    loaded = load_recipe(name)
    batch_size = overrides.get("batch_size")
    # An invalid batch size is reported by `convert`.
    if isinstance(batch_size, int) and batch_size > 0 and "learning_rate" not in overrides:
        overrides["learning_rate"] = scaled_learning_rate(loaded, batch_size)
    changed = convert({**msgspec.to_builtins(loaded), **overrides}, Recipe, source="The run")
    return RunConfig(recipe_name=name, recipe=changed, **fields)


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
    text = re.sub(r"objective:\n(  .*\n)+", lambda _: "\n".join([*lines, ""]), commented_yaml(recipe))
    return "\n".join([*heading, usage, "", text])


def load_recipe(name: str) -> Recipe:
    """Load a recipe by name, or from a YAML file of the same form."""
    path = Path(name) if name.endswith(RECIPE_SUFFIXES) else RECIPES / f"{name}.yaml"
    if not is_file(path) and path.parent == RECIPES:
        raise ConfigError(
            f"There is no recipe {quoted(name)}.{near_matches(name, recipe_names())}",
            hint=f"one of {', '.join(recipe_names())}, or a YAML file: clip-rd-edge recipe clip-rd > mine.yaml",
        )
    return read_yaml(path, Recipe)


def first_difference(
    old: RunConfig | RecordedConfig, new: RunConfig, *, ignored: Collection[str] = CHANGEABLE_ON_RESUME
) -> str | None:
    """Return the first difference as `key: old → new`, or None; a resumed run ignores CHANGEABLE_ON_RESUME.

    The names of recipe files may differ, since their contents are compared.
    """
    old_fields, new_fields = _flatten(old), _flatten(new)
    if str(old_fields["recipe_name"]).endswith(RECIPE_SUFFIXES) and new.recipe_name.endswith(RECIPE_SUFFIXES):
        ignored = {*ignored, "recipe_name"}
    for key in {**new_fields, **old_fields}:
        was, value = old_fields.get(key), new_fields.get(key)
        if key not in ignored and was != value:
            return f"{key}: {shown_sources(was)} → {shown_sources(value)}"
    return None


def plain_values(config: RunConfig | RecordedConfig) -> dict[str, Any]:
    """Return a configuration as the texts, numbers, lists and dicts of config.yaml."""
    values: dict[str, Any] = msgspec.to_builtins(config, enc_hook=Recorded.plain)
    return values


def _flatten(config: RunConfig | RecordedConfig) -> dict[str, object]:
    fields = plain_values(config)
    recipe = fields.pop("recipe")
    objective = recipe.pop("objective")
    return {**fields, **recipe, **{f"objective.{name}": weight for name, weight in objective.items()}}
