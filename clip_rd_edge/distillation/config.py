"""What a run is: the recipe (how to train) and the rest (what to train, on what), resolved into one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import msgspec

from clip_rd_edge.errors import ConfigError, UsageError, near_matches
from clip_rd_edge.losses.logits import PUBLISHED_START, ScaleKind
from clip_rd_edge.losses.objective import Weights
from clip_rd_edge.utils.io import convert, read_yaml

if TYPE_CHECKING:
    from typing_extensions import Unpack

RECIPES = Path(__file__).parent / "recipes"
# What a resumed run may have otherwise: it changes what is written or how fast, and no batch and no loss.
MAY_CHANGE = frozenset(
    {"log_every", "checkpoint_every", "evaluate_every", "tasks", "report_to", "workers", "max_bad", "teacher_cache"}
    | {"processes"}
)
Precision = Literal["auto", "fp32", "bf16", "fp16"]
# What a recipe becomes for `quantize` where nothing else is said: a short fine-tuning, in float32, which alone holds
# INT8's steps exactly.
QUANTIZED: dict[str, Any] = {"steps": 300, "learning_rate": 1e-4, "precision": "fp32"}


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train.

    Attributes:
        objective: the terms' weights.
        scales, scale_start: see `losses.scales.Scales`.
        epochs: rounds over the pairs; `steps`, where not 0, is used instead.
        batch_size: pairs a step.
        learning_rate: peak, after a linear warm-up of `warmup_steps` (at most a tenth of the run); then cosine to 0.
        weight_decay: on matrices and kernels; biases, norms and the student's logit scale have none.
        scales_weight_decay: on the objective's own scales.
        clip_gradient_norm: 0 leaves gradients as they are.
        crop_scale: least and greatest part of a picture's area that a training crop keeps.
        ema_decay: of a moving average of the weights, which then is evaluated and kept; 0 keeps the weights themselves.
        precision: `auto` times float32 and bfloat16 on this machine and takes the faster; `fp16` scales the loss.
    """

    objective: Weights
    scales: ScaleKind = "bounded"
    scale_start: float = PUBLISHED_START
    epochs: int = 32
    steps: int = 0
    batch_size: int = 1024
    learning_rate: float = 1e-3
    warmup_steps: int = 10_000
    weight_decay: float = 0.1
    scales_weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-6
    clip_gradient_norm: float = 0.0
    crop_scale: tuple[float, float] = (0.9, 1.0)
    ema_decay: float = 0.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is [{low}, {high}]; expected two growing numbers above 0 and up to 1")


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole run, as `config.yaml` keeps it.

    Attributes:
        data: what `data.pairs.load_pairs` takes.
        csv_img_key, csv_caption_key: columns of a table.
        train_data_upsampling_factors, json_caption_key: of shards; `weights` and `json_key` of `load_pairs`.
        max_bad: share of the samples that may be unreadable and passed over.
        teacher: what `models.load.load_clip` takes; None where the objective needs no teacher.
        student: a preset, a timm trunk, a JSON configuration; or `local-dir:PATH` of a model to go on from.
        embedding_size: the student's; 0 takes the teacher's, or 512 without a teacher. Where it differs from the
            teacher's, the objective learns projections between the two, which stay in the objective.
        text: see `models.student.text_size`.
        pretrained_image, pretrained_text: what the towers start from; see `models.pretrained`.
        teacher_precision: what the teacher computes in, measured apart from the student's.
        teacher_cache: folder of the teacher's embeddings, computed once; needs `views`.
        views: different crops and captions of a pair, gone through again and again; 0 for new ones every epoch.
        freeze_text: train nothing of the text tower but its last projection.
        quantize: fine-tune a trained student for static INT8; see `distill.quantized`.
        compile: run the student's towers through torch.compile.
        gradient_checkpointing: compute activations again on the way back, to save memory.
        accumulate: chunks that a process's part of a batch goes through the towers in, to save memory.
        loss_block: pairs that the objective looks at together, to save memory; 0 for all of a process's own.
        global_logits: with several processes, each looks at all pairs and not at its own alone.
        report_to: `tensorboard` writes the metrics there, too.
        evaluate_every: steps between evaluations on `tasks`; 0 evaluates at the end alone.
        processes: that share a batch, as torchrun started them. A resumed run may have another number: batches and
            loss stay what they are, but batch norms and dropout see each process's part.
    """

    recipe_name: str
    recipe: Recipe
    data: str
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    train_data_upsampling_factors: str | None = None
    json_caption_key: str | None = None
    max_bad: float = 0.01
    teacher: str | None = None
    teacher_pretrained: str | None = None
    student: str
    image_size: int = 224
    text: str = "standard"
    context_length: int = 77
    embedding_size: int = 0
    pretrained_image: str | None = None
    pretrained_text: str | None = None
    teacher_precision: Precision = "auto"
    teacher_cache: str | None = None
    views: int = 0
    freeze_text: bool = False
    quantize: Literal["int8"] | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    accumulate: int = 1
    loss_block: int = 0
    global_logits: bool = False
    processes: int = 1
    seed: int = 0
    workers: int = -1
    log_every: int = 10
    checkpoint_every: int = 500
    evaluate_every: int = 0
    tasks: tuple[str, ...] = ()
    report_to: Literal["tensorboard"] | None = None


class DistillOptions(TypedDict, total=False):
    """The options of `clip_rd_edge.distill` and of the command line beside its main ones.

    Most are fields of `RunConfig`; `epochs`, `steps`, `batch_size`, `learning_rate`, `ema_decay` and `precision`
    replace the recipe's own values.
    """

    csv_img_key: str
    csv_caption_key: str
    train_data_upsampling_factors: str | None
    json_caption_key: str | None
    max_bad: float
    teacher_pretrained: str | None
    epochs: int | None
    steps: int | None
    batch_size: int | None
    learning_rate: float | None
    precision: Precision | None
    image_size: int
    text: str
    pretrained_image: str | None
    pretrained_text: str | None
    context_length: int
    embedding_size: int
    teacher_cache: str | None
    views: int
    compile: bool
    gradient_checkpointing: bool
    ema_decay: float | None
    accumulate: int
    loss_block: int
    global_logits: bool
    freeze_text: bool
    quantize: Literal["int8"] | None
    seed: int
    workers: int
    tasks: Sequence[str]
    evaluate_every: int
    report_to: Literal["tensorboard"] | None
    checkpoint_every: int


_OF_THE_RECIPE = ("epochs", "steps", "batch_size", "learning_rate", "precision", "ema_decay")


def resolve(
    recipe: str, *, data: str, student: str, teacher: str | None = None, **options: Unpack[DistillOptions]
) -> RunConfig:
    """The run that the options describe: the recipe, with what the options change.

    Raises:
        ConfigError: no such recipe, or a value that does not fit.
        UsageError: no such option.
    """
    if unknown := sorted(set(options) - set(DistillOptions.__annotations__)):
        raise UsageError(
            f"There is no option {unknown[0]!r} of distill.{near_matches(unknown[0], DistillOptions.__annotations__)}"
        )
    given = dict(options)
    changes = {name: value for name in _OF_THE_RECIPE if (value := given.pop(name, None)) is not None}
    if "epochs" in changes and "steps" not in changes:
        changes["steps"] = 0
    if "precision" in changes:
        given["teacher_precision"] = changes["precision"]
    if given.get("quantize"):
        changes = {**QUANTIZED, **changes}
    raw = {
        **given,
        "recipe_name": recipe,
        "recipe": {**msgspec.to_builtins(load_recipe(recipe)), **changes},
        "data": data,
        "student": student,
        "teacher": teacher,
    }
    return convert(raw, RunConfig, source="The run")


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a YAML file of the same form.

    Raises:
        ConfigError: no such recipe (with near matches), or a key or value that does not fit.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file() and path.parent == RECIPES:
        raise ConfigError(
            f"There is no recipe {name!r}.{near_matches(name, recipe_names())}",
            hint=f"one of {', '.join(recipe_names())}, or the path of a YAML file",
        )
    return read_yaml(path, Recipe)


def first_difference(old: RunConfig, new: RunConfig) -> str | None:
    """Where two configurations differ first, as `key: old → new`, or None. What only changes the output is let pass."""
    before, after = _flat(old), _flat(new)
    for key, value in after.items():
        if key not in MAY_CHANGE and before.get(key) != value:
            return f"{key}: {before.get(key)} → {value}"
    return None


def _flat(config: RunConfig) -> dict[str, object]:
    plain = msgspec.to_builtins(config)
    recipe = plain.pop("recipe")
    objective = recipe.pop("objective")
    return {**plain, **recipe, **{f"objective.{name}": weight for name, weight in objective.items()}}
