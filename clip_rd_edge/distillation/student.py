"""The student of a run: built or loaded by its configuration, with the weights that it starts from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import msgspec
from torch import nn

from clip_rd_edge.bundle.labels import parse_templates
from clip_rd_edge.distillation.config import RunConfig, is_texts_alone
from clip_rd_edge.distillation.pixels import Crops, crops_for
from clip_rd_edge.distillation.teacher import (
    ensemble_of,
    load_stored_teachers,
    load_teachers,
    projection_name,
    teacher_weights,
)
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, UsageError
from clip_rd_edge.losses.objective import Weights
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.encoder import text_groups, text_transformer
from clip_rd_edge.models.load import known_config, load_clip
from clip_rd_edge.models.names import is_trained
from clip_rd_edge.models.students import (
    TEACHER,
    TEXT_SIZES,
    build_student,
    copy_image_tower,
    init_image_tower,
    require_student,
    student_config,
    student_preprocessing,
    text_size,
    with_image_of,
)
from clip_rd_edge.models.text_weights import (
    TOKENS,
    build_with_text_tower_of,
    init_text_tower,
    init_token_embeddings,
    with_text_of,
)
from clip_rd_edge.utils.paths import Typed, typed
from clip_rd_edge.utils.text import SILENT, Reporter

_SIGMOID_START = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}  # of Zhai et al. 2023
_DEFAULT_SHAPE: dict[str, Any] = {"image_size": 224, "text": "standard", "context_length": 77}


def make_student(
    config: RunConfig, teachers: Sequence[ClipModel], *, name: str, reporter: Reporter = SILENT
) -> ClipModel:
    """Return the student of a run with its initial weights: a new one, or a trained model to fine-tune."""
    student = _student_to_train(config, teachers, name, reporter)
    require_trained_bias(student, config.recipe.objective)
    if config.quantize:
        from clip_rd_edge.distillation.quantized import require_static_tower

        require_static_tower(student)
    if config.templates:  # the prompts that it learns are those to classify with
        prompts = parse_templates(config.templates).prompts
        return replace(student, templates=tuple(prompt.replace("{c}", "{}") for prompt in prompts))
    return student


def with_default_shape(config: RunConfig) -> RunConfig:
    """Return the configuration with the shape of a new student, where none was asked for.

    What a model determines stays None: the shape of a trained student, and the context length of a reused text tower.
    """
    if is_trained(config.student):
        return config
    try:
        require_student(config.student)
    except ClipRdEdgeError:  # it may have been a trained student, of a finished run; otherwise it is refused later
        return config
    names = [name for name in open_shape(config) if name != "context_length" or not takes_text(config)]
    return msgspec.structs.replace(config, **{name: _DEFAULT_SHAPE[name] for name in names})


def open_shape(config: RunConfig) -> frozenset[str]:
    """Return the fields of the student's shape that the configuration leaves open."""
    return frozenset(name for name in _DEFAULT_SHAPE if getattr(config, name) is None)


def with_shape_of(config: RunConfig, student: ClipModel) -> RunConfig:
    """Return the configuration with the student's own shape; its text tower from Hugging Face has no size to name."""
    shape = _shape_of(student.model_cfg)
    if config.text is not None or student.has_hugging_face_text:
        shape["text"] = config.text
    return msgspec.structs.replace(config, **{name: shape[name] for name in _DEFAULT_SHAPE})


def require_named_student(config: RunConfig) -> None:
    """Refuse a student or text tower whose name cannot be right, and options that do not suit it.

    It is called before the data are indexed and a teacher is fetched, which may take hours: no weights are read, and
    nothing is built.
    """
    if is_trained(config.student):
        _require_shape(config, known_config(config.student))
    else:
        require_student(config.student)
    for option, reason, instead in _unsuited(config):
        raise UsageError(
            f"{{{option}}} cannot be used: {reason}.", hint=f"omit {{{option}}}, or {instead}", option=option
        )
    if config.text is not None and config.text != TEACHER:
        if text_source(config) is None:
            text_size(config.text)
        else:
            known_config(config.text)
    if config.recipe.objective.needs_teacher and config.stored_teachers is None:
        for name in config.teachers:
            known_config(name, pretrained=teacher_weights(config, name))


def _unsuited(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Yield the options that the run has no use for, each with the reason, and what else could be changed."""
    if is_trained(config.student):
        weighted = [name for name in ("pretrained_image", "pretrained_text") if getattr(config, name)]
        yield from ((name, f"{config.student} already has weights", "name another {student}") for name in weighted)
    else:
        asked = {"tuned_share": config.tuned_share < 1, "quantize": config.quantize}
        for name in (name for name in asked if asked[name]):
            yield name, f"{config.student} has no weights to start from", "name a trained model with {student}"
    if config.quantize:
        floating = {"precision": config.recipe.precision != "fp32", "compile": config.compile}
        wrong = {**floating, "gradient_checkpointing": config.gradient_checkpointing}
        yield from ((name, "{quantize} trains without it", "omit {quantize}") for name in wrong if wrong[name])
    if not config.recipe.objective.needs_teacher or config.stored_teachers is not None:
        for name in ("text", "pretrained_text", "pretrained_image"):
            if getattr(config, name) in (TEACHER, TOKENS):
                yield name, "the run has no model of a teacher", "choose another {recipe} or {teacher}"


def _student_to_train(config: RunConfig, teachers: Sequence[ClipModel], name: str, reporter: Reporter) -> ClipModel:
    if is_trained(config.student):
        student = load_student(config)
        _require_shape(config, student.model_cfg)
        return student
    student = _build_student(config, teachers, name)
    if config.pretrained_image == TEACHER:
        reporter.note(copy_image_tower(student, teachers[0]))
    elif config.pretrained_image:
        reporter.note(init_image_tower(student, config.pretrained_image))
    if config.pretrained_text == TOKENS:
        reporter.note(init_token_embeddings(student, teachers, reporter))
    elif config.pretrained_text:
        reporter.note(init_text_tower(student, config.pretrained_text, teachers[0] if teachers else None))
    return student


def load_student(config: RunConfig) -> ClipModel:
    """Load the trained student of a run, whose text tower is a module of its own, which can be frozen."""
    return load_clip(config.student, separate_text=True)


def _require_shape(config: RunConfig, model_cfg: dict[str, Any]) -> None:
    """Raise a UsageError if a trained student is asked to have another shape than it has, as far as that is known."""
    actual = _shape_of(model_cfg) if model_cfg else {}
    asked_for = {name: getattr(config, name) for name in actual}
    if config.text is not None and not takes_text(config):
        size = text_size(config.text)
        asked_for["text"] = f"{size.width}x{size.layers}"
    for name, value in actual.items():
        if asked_for[name] not in (value, None, 0):  # 0: the embedding size of a teacher
            raise UsageError(
                f"{config.student} is trained with {{{name}}} {value}; {getattr(config, name)} was asked for.",
                hint=f"omit {{{name}}}, or name an architecture with {{student}}",
                option=name,
            )


def _shape_of(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """Return a model's shape, with a text tower as `text_size` takes it, or the name of one from Hugging Face."""
    image_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    size = image_cfg.get("image_size", 224)  # open_clip's defaults
    text = text_cfg.get("hf_model_name") or f"{text_cfg.get('width', 512)}x{text_cfg.get('layers', 12)}"
    return {
        "image_size": max(size) if isinstance(size, list | tuple) else size,
        "context_length": text_cfg.get("context_length", 77),
        "embedding_size": model_cfg["embed_dim"],
        "text": text,
    }


def text_source(config: RunConfig) -> Typed | None:
    """Return the name of the model whose text tower a new student takes; None for a new tower, or the teacher's."""
    if config.text is None or config.text in (TEACHER, *TEXT_SIZES) or not is_trained(config.text):
        return None
    return typed(config.text)


def takes_text(config: RunConfig) -> bool:
    """Return whether a new student takes the text tower of a model, which may be its teacher."""
    return config.text == TEACHER or text_source(config) is not None


def _build_student(config: RunConfig, teachers: Sequence[ClipModel], name: str) -> ClipModel:
    """Return a new student, whose weights are random unless it takes the text tower of a model."""
    architecture = _student_architecture(config, teachers)
    if not takes_text(config):
        return build_student(architecture, name=name)
    source = text_source(config)
    clip = load_clip(source) if source else teachers[0]
    return build_with_text_tower_of(clip, architecture, name=name)


def _student_architecture(config: RunConfig, teachers: Sequence[ClipModel]) -> dict[str, Any]:
    """Return the open_clip configuration of a new student, which may depend on those of the teachers."""
    shape = {name: getattr(config, name) or default for name, default in _DEFAULT_SHAPE.items()}
    if takes_text(config):
        shape["text"] = "tiny"  # a placeholder that costs no time
    embedding_size = config.embedding_size or _embedding_size(config, teachers)
    architecture = student_config(config.student, embedding_size=embedding_size, **shape)
    if config.pretrained_image == TEACHER:
        architecture = with_image_of(architecture, teachers[0])
    if config.pretrained_text == TEACHER:
        architecture = with_text_of(architecture, teachers[0])
    if "sigmoid" in config.recipe.objective:
        architecture["model_cfg"] |= _SIGMOID_START
    return architecture


def _embedding_size(config: RunConfig, teachers: Sequence[ClipModel]) -> int:
    if (source := text_source(config)) is not None:
        return int((known_config(source) or load_clip(source).model_cfg)["embed_dim"])
    if (stored := load_stored_teachers(config)) is not None:
        return sum(stored.ensemble.widths)
    if config.text == TEACHER or config.pretrained_image == TEACHER:
        teachers = teachers[:1]
    return sum(ensemble_of(teachers).widths) if teachers else 512


def crops_of(config: RunConfig) -> Crops:
    """Return the crops of a run: those for the input of its student, which is square unless it is a trained one."""
    if is_trained(config.student):
        preprocessing = load_student(config).preprocessing
    else:
        preprocessing = student_preprocessing(config.student)
    return crops_for(preprocessing, config.recipe.crop_scale, config.decode)


def empty_student(config: RunConfig, *, name: str) -> ClipModel:
    """Return the untrained student of a run; teachers are loaded if its architecture depends on them."""
    if is_trained(config.student):
        return load_student(config)
    depends = config.embedding_size == 0 or TEACHER in (config.text, config.pretrained_image, config.pretrained_text)
    return _build_student(config, load_teachers(config) if depends else (), name)


def require_trained_bias(student: ClipModel, objective: Weights) -> None:
    """Check that a student has a logit bias, as SigLIP's models do, if the term `sigmoid` trains it, and only then."""
    has_bias = getattr(student.model, "logit_bias", None) is not None
    if has_bias is not ("sigmoid" in objective):
        raise UsageError(
            f"The student {student.name} has {'a' if has_bias else 'no'} logit bias, and the recipe has "
            f"{'no' if has_bias else 'the'} term sigmoid, which trains it.",
            hint="{recipe} siglip-kd, or another in which the term sigmoid has a weight"
            if has_bias
            else "name another {recipe} or {student}",
        )


def set_training_mode(student: ClipModel, config: RunConfig) -> None:
    """Put the student in training mode; freeze what the configuration names.

    With `freeze_text`, its text tower is frozen except for the projection; with `freeze_text_layers` and
    `freeze_image`, the first groups of layers of a tower; without any images, the whole image tower. With `quantize`,
    it is put in evaluation mode: batch norms are folded into convolutions, so their statistics must not change. With
    `freeze_norms`, only the batch norms are in evaluation mode.
    """
    student.model.train(config.quantize is None)
    if config.freeze_norms:
        for module in student.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    if config.gradient_checkpointing:
        student.model.set_grad_checkpointing(True)  # type: ignore[operator]
        if student.has_hugging_face_text:
            # By default, transformers before 5 recompute in a way that several processes cannot have: it reports
            # each gradient to DistributedDataParallel twice.
            transformer: Any = student.model.get_submodule("text.transformer")
            transformer.gradient_checkpointing_enable({"use_reentrant": False})
    if config.freeze_text:
        text = student.model.get_submodule("text").requires_grad_(False).eval()  # its dropout is off, too
        projection: Any = getattr(text, projection_name(text))
        if projection is not None:
            projection.requires_grad_(True)
    elif config.freeze_text_layers:
        groups = text_groups(student)  # the embeddings first
        _freeze_first(groups, config.freeze_text_layers, text_transformer(student), option="freeze_text_layers")
    if is_texts_alone(config):
        student.model.get_submodule("visual").eval().requires_grad_(False)
    elif config.freeze_image:
        groups, trunk = _image_groups(student)
        _freeze_first(groups, config.freeze_image, trunk, option="freeze_image")


def _image_groups(student: ClipModel) -> tuple[list[list[nn.Parameter]], nn.Module]:
    """Return timm's groups of layers of an image tower, the stem first, then its blocks; and the trunk."""
    from timm.models import group_parameters

    trunk: Any = getattr(student.model.get_submodule("visual"), "trunk", None)
    if not hasattr(trunk, "group_matcher"):
        raise UsageError(
            f"The first layers of {student.name} cannot be frozen: timm has no groups of them.",
            hint="omit {freeze_image}, or name another {student}",
            option="freeze_image",
        )
    groups: dict[int, list[str]] = group_parameters(trunk, trunk.group_matcher())
    return [[trunk.get_parameter(name) for name in groups[group]] for group in sorted(groups)], trunk


def _freeze_first(groups: Sequence[Iterable[nn.Parameter]], count: int, within: nn.Module, *, option: str) -> None:
    """Compute no gradient for the first groups of parameters; modules without others go into evaluation mode."""
    if count >= len(groups):
        raise ConfigError(
            f"{count} groups of layers were to be frozen, but the tower has {len(groups)}.",
            hint=f"{{{option}}} takes 0 to {len(groups) - 1}",
            option=option,
        )
    for parameter in chain.from_iterable(groups[:count]):
        parameter.requires_grad_(False)
    for module in within.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
