"""Which parts of the student are trained, and which keep what they know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from clip_rd_edge.bundle.runs import model_folder
from clip_rd_edge.distillation.config import RunConfig, is_texts_alone
from clip_rd_edge.distillation.student import takes_text
from clip_rd_edge.distillation.teachers.teacher import projection_name
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.text_towers import text_groups, text_transformer
from clip_rd_edge.models.text_weights import TOKENS

_SCALES = ("logit_scale", "logit_bias")  # parameters outside of the towers


def set_training_mode(student: ClipModel, config: RunConfig) -> None:
    """Put the student in training mode; freeze what the configuration says.

    With `freeze_text`, its text tower is frozen except for the projection; with `freeze_text_layers` and
    `freeze_image`, the first groups of layers of a tower; without any images, the whole image tower. With `quantize`,
    it is put in evaluation mode: batch norms are folded into convolutions, so their statistics must not change. With
    `freeze_norms`, only the batch norms are in evaluation mode.
    """
    student.model.train(config.quantize is None)
    if config.freeze_norms:
        for module in student.model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
    if config.gradient_checkpointing:
        student.model.set_grad_checkpointing(True)  # type: ignore[operator]
        if student.has_hugging_face_text:
            # By default, transformers before 5 recompute in a way that several processes cannot have: it reports
            # each gradient to DistributedDataParallel twice.
            transformer: Any = student.model.get_submodule("text.transformer")
            transformer.gradient_checkpointing_enable({"use_reentrant": False})
    if config.freeze_text:
        freeze_all_but_projection(student.model.get_submodule("text"))
    elif config.freeze_text_layers:
        freeze_first_text_layers(student, config.freeze_text_layers)
    if is_texts_alone(config):
        image_tower = student.model.get_submodule("visual")
        image_tower.eval().requires_grad_(False)
    elif config.freeze_image:
        freeze_first_layers(student, config.freeze_image)
    _require_trained_part(student, config)


def _require_trained_part(student: ClipModel, config: RunConfig) -> None:
    """Raise a UsageError if no tower has a parameter to train, as without images and a projection of the text tower.

    The logit scale, which belongs to no tower, changes no answer.
    """
    trained = (name for name, parameter in student.model.named_parameters() if parameter.requires_grad)
    if all(name in _SCALES for name in trained):
        reasons = [
            *(["there are no images to train the image tower on"] if is_texts_alone(config) else []),
            *(["its frozen text tower has no projection to train"] if config.freeze_text else []),
        ]
        raise UsageError(
            f"Nothing of {student.name} would be trained: {' and '.join(reasons) or 'all of it is frozen'}.",
            hint="name images: {images} FOLDER, or {data} PAIRS; or train the text tower: another {text}, and no "
            "{freeze_text}",
        )


def frozen_at_random(config: RunConfig) -> Iterator[str]:
    """Yield a sentence for each tower of a new student that has frozen layers with random weights, which never learn.

    Args:
        config: as the run began: a checkpoint replaces the weights that it names.
    """
    if model_folder(config.student) is not None:
        return
    has_tokens = config.pretrained_text == TOKENS  # which are the first group of layers
    frozen_text = config.freeze_text or config.freeze_text_layers > has_tokens
    if frozen_text and not takes_text(config) and (has_tokens or not config.pretrained_text):
        yield _FROZEN_AT_RANDOM.format(tower="text")
    if config.freeze_image and not config.pretrained_image:
        yield _FROZEN_AT_RANDOM.format(tower="image")


_FROZEN_AT_RANDOM = (
    "the frozen layers of the {tower} tower keep random weights: --pretrained-{tower} names weights to start from"
)


def freeze_all_but_projection(text: nn.Module) -> None:
    """Freeze a text tower except for its projection, and disable its dropout."""
    projection = getattr(text, projection_name(text))
    parts = projection.parameters() if isinstance(projection, nn.Module) else [projection]  # None without a projection
    trained = {id(parameter) for parameter in parts}
    for parameter in text.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    text.eval()


def freeze_first_layers(student: ClipModel, count: int) -> None:
    """Freeze the first groups of layers of an image tower, and put them in evaluation mode.

    They are timm's groups, of which the first is the stem; the others are blocks. No gradient is computed for them, and
    none flows through them to the input.
    """
    from timm.models import group_parameters

    if "timm_model_name" not in student.model_cfg["vision_cfg"]:
        raise UsageError(
            f"The first layers of {student.name} cannot be frozen: its image tower is not a timm trunk.",
            hint="omit {freeze_image}",
        )
    trunk: Any = student.model.get_submodule("visual.trunk")
    if not hasattr(trunk, "group_matcher"):
        raise UsageError(
            f"The first layers of {student.name} cannot be frozen: timm does not say how its layers form groups.",
            hint="omit {freeze_image}, or name another {student}",
        )
    groups: dict[int, list[str]] = group_parameters(trunk, trunk.group_matcher())
    if count >= len(groups):
        raise ConfigError(
            f"{count} groups of layers of {student.name} were to be frozen, but its image tower has {len(groups)}.",
            hint=f"{{freeze_image}} takes 0 to {len(groups) - 1}",
        )
    _freeze([[trunk.get_parameter(name) for name in groups[group]] for group in sorted(groups)[:count]], within=trunk)


def freeze_first_text_layers(student: ClipModel, count: int) -> None:
    """Freeze the first groups of layers of a text tower, the embeddings first, and disable their dropout.

    What they know of words that are in no caption stays as it is, and no gradient is computed for them.
    """
    groups = text_groups(student)
    if count >= len(groups):
        raise ConfigError(
            f"{count} groups of layers of {student.name} were to be frozen, but its text tower has {len(groups)}, the "
            "embeddings among them.",
            hint=f"{{freeze_text_layers}} takes 0 to {len(groups) - 1}; {{freeze_text}} freezes all",
        )
    _freeze(groups[:count], within=text_transformer(student))


def _freeze(groups: Iterable[Iterable[nn.Parameter]], *, within: nn.Module) -> None:
    """Compute no gradient for groups of parameters, and put the modules that have no others in evaluation mode."""
    for parameter in chain.from_iterable(groups):
        parameter.requires_grad_(False)
    for module in within.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
