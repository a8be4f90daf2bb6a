"""Evidence suites: students × methods × seeds trained with the same settings, as a small YAML file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from clip_rd_edge.benchmarking.suite import Threads, find_suite
from clip_rd_edge.data.load import local_place
from clip_rd_edge.distillation.config import CROP_SCALE, Precision, Recipe, RunConfig, Seed, load_recipe
from clip_rd_edge.distillation.student import crops_of, takes_text
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.models.students import TEACHER
from clip_rd_edge.utils.paths import Typed, typed
from clip_rd_edge.utils.structs import (
    CheckedStruct,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    convert,
    read_yaml,
)

_SHARED = ("objective", "steps", "epochs", "batch_size", "learning_rate", "precision")  # not a method's own settings
TEACHER_RESULT = "teacher-result.json"  # beside the suite's own NAME.json
TUNED_TEACHER = "teacher"  # the built-in one's folder beside it, and so its name
_SAFE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class Method(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A method to train students with.

    Attributes:
        name: its name in tables and folders.
        recipe: recipe name or file, as in `distillation.config.load_recipe`.
        weights: loss weights that differ from the recipe's.
        settings: further keys that differ from the recipe's, such as `bank_temperature`.
        steps: the suite's by default; others, or those of some students by their names, make methods comparable that
            take different times per step.
        text: the text tower, as in `RunConfig`; the suite's by default.
        pretrained_text: what the text tower starts from, as in `RunConfig`; random weights by default.
        freeze_text_layers: groups of layers of the text tower that are not trained, as in `RunConfig`.
    """

    name: str
    recipe: str
    weights: dict[str, NonNegativeFloat] = msgspec.field(default_factory=dict)
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
    steps: PositiveInt | dict[str, PositiveInt] | None = None
    text: str | None = None
    pretrained_text: str | None = None
    freeze_text_layers: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if shared := sorted(set(self.settings) & set(_SHARED)):
            raise ValueError(
                f"the settings of the method {self.name} have {shared[0]!r}; expected keys of a recipe other than "
                f"{', '.join(_SHARED)}, which are weights or keys of the method or the suite"
            )
        _require_safe("the method's name", self.name)


def _require_safe(what: str, name: str) -> None:
    """Raise ValueError if a name cannot be that of a file or folder, on any system."""
    if not _SAFE_NAME.fullmatch(name):
        raise ValueError(f"{what} is {name!r}; expected lower-case letters, digits, '.', '-' and '_'")


class EvidenceSuite(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A comparison of methods.

    Attributes:
        name: its name in reports, and that of their files.
        data, tasks: training data and test tasks, named as for `distill` and `evaluate`.
        students: presets or timm names.
        compare_with: methods that all others are compared with, paired by seed.
        views: see `RunConfig`; the teacher's embeddings of the views are computed once per seed.
        evaluate_every: steps between the points of the learning curves.
        context_length: tokens per caption; the text tower of a model, in `text`, keeps its own.
        teacher_steps: steps to tune the built-in teacher, if no other teacher is given.
        threads: number of training threads.
    """

    name: str
    data: str
    tasks: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    students: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    methods: Annotated[tuple[Method, ...], msgspec.Meta(min_length=1)]
    compare_with: tuple[str, ...] = ()
    seeds: Annotated[tuple[Seed, ...], msgspec.Meta(min_length=1)]
    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    precision: Precision
    image_size: PositiveInt
    text: str
    context_length: PositiveInt
    embedding_size: PositiveInt
    views: PositiveInt
    evaluate_every: PositiveInt
    log_every: PositiveInt
    teacher_steps: PositiveInt = 400
    threads: Threads = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_safe("the suite's name", self.name)
        if self.name == Path(TEACHER_RESULT).stem:
            raise ValueError(f"the suite's name is {self.name}; expected another, as {TEACHER_RESULT} is the teacher's")
        names = [method.name for method in self.methods]
        for field, values in (("methods", names), ("students", self.students), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{field} has duplicates: {', '.join(map(str, values))}")
        for name in self.compare_with:
            if name not in names:
                raise ValueError(f"compare_with names {name!r}; expected one of {', '.join(names)}")
        for method in self.methods:
            for student in method.steps if isinstance(method.steps, dict) else ():
                if student not in self.students:
                    raise ValueError(
                        f"steps of the method {method.name} names the student {student!r}; expected one of "
                        f"{', '.join(self.students)}"
                    )
        if self.precision == "auto":
            raise ValueError("precision is auto; expected fp32, bf16 or fp16, so that all runs have the same")

    def trained_on(self) -> list[str]:
        """Return the tasks that name the training data."""
        return [task for task in self.tasks if Path(task) == Path(self.data)]

    def runs(self) -> Iterator[Run]:
        """Yield all runs, seed by seed, so that an unfinished suite already gives complete tables."""
        for seed in self.seeds:
            for student in self.students:
                for method in self.methods:
                    yield Run(student, method, seed)

    def place(self, text: str) -> Typed:
        """Return a name or a path in the suite, as if it was typed."""
        return local_place(text, source=f"The suite {self.name}")

    def steps_of(self, method: Method, student: str) -> int:
        """Return the number of steps for which a method trains a student."""
        own = method.steps.get(student) if isinstance(method.steps, dict) else method.steps
        return own or self.steps

    def recipe(self, method: Method, student: str) -> Recipe:
        """Return a method's recipe with this suite's settings."""
        raw = msgspec.to_builtins(load_recipe(method.recipe))
        raw |= {**method.settings, "objective": {**raw["objective"], **method.weights}}
        recipe = convert(raw, Recipe, source=f"The method {method.name}")
        if not recipe.objective:
            raise ConfigError(f"All weights of the method {method.name} are 0; expected at least one term.")
        return msgspec.structs.replace(
            recipe,
            steps=self.steps_of(method, student),
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            precision=self.precision,
        )


@dataclass(frozen=True)
class Run:
    """One training run of a suite."""

    student: str
    method: Method
    seed: int

    def __str__(self) -> str:
        return f"{self.student}, {self.method.name}, seed {self.seed}"

    @property
    def subfolder(self) -> Path:
        """The run's folder, relative to the suite's; a student that is the path of a file makes a single name."""
        return (
            Path("runs") / re.sub(r"[/\\:]+", "-", self.student).lstrip("-.") / self.method.name / f"seed-{self.seed}"
        )


def read_evidence(suite: str) -> EvidenceSuite:
    """Read a suite from a YAML file, or a shipped suite by its name."""
    try:
        evidence_suite = read_yaml(find_suite(suite, key="methods"), EvidenceSuite)
    except ConfigError as error:
        hint = "evidence takes students, methods and seeds; models are compared by clip-rd-edge benchmark"
        raise ConfigError(str(error), hint=hint) from error
    for place in (evidence_suite.data, *evidence_suite.tasks):
        evidence_suite.place(place)
    for method in evidence_suite.methods:
        evidence_suite.recipe(method, evidence_suite.students[0])
    return evidence_suite


def run_config(suite: EvidenceSuite, run: Run, *, teacher: Typed, stores: Path) -> RunConfig:
    """Return the configuration of a run.

    Args:
        teacher: model name, as in `load_clip`.
        stores: folder of the teacher's embeddings, with one store per seed and crops, because views depend on these.
    """
    recipe = suite.recipe(run.method, run.student)
    needs_teacher = recipe.objective.needs_teacher
    text, pretrained_text = run.method.text or suite.text, run.method.pretrained_text
    config = RunConfig(
        recipe_name=Typed(run.method.name),
        recipe=recipe,
        data=suite.place(suite.data),
        teacher=teacher if needs_teacher else None,
        student=suite.place(run.student),
        image_size=suite.image_size,
        text=suite.place(text),
        freeze_text=text == TEACHER,
        pretrained_text=suite.place(pretrained_text) if pretrained_text else None,
        freeze_text_layers=run.method.freeze_text_layers,
        context_length=suite.context_length,
        embedding_size=suite.embedding_size,
        teacher_precision=suite.precision,
        views=suite.views,
        seed=run.seed,
        workers=0,
        log_every=suite.log_every,
        checkpoint_every=suite.evaluate_every,
        evaluate_every=suite.evaluate_every,
        tasks=tuple(map(suite.place, suite.tasks)),
    )
    if takes_text(config):
        config = msgspec.structs.replace(config, context_length=None)
    if not needs_teacher:
        return config
    return msgspec.structs.replace(config, store=typed(stores / _store_name(config)))


def _store_name(config: RunConfig) -> str:
    crops, name = crops_of(config), f"seed-{config.seed}"
    if crops.scale != CROP_SCALE:
        name += f"-crops-{crops.scale[0]}-{crops.scale[1]}"
    if crops.aspect_ratio is None:
        return f"{name}-squash"
    return name if crops.aspect_ratio == 1 else f"{name}-{crops.aspect_ratio:.3f}"
