"""A student's image tower that starts as the teacher's whole image tower, projection included."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.models.clip import ClipModel, ImageTower, evaluation_mode, quick_gelu_of
from clip_rd_edge.models.text.config import require_equal

_TIMM_NAME = "timm_model_name"
_HINT = "name the teacher's architecture with {student}, or omit {pretrained_image}"


def with_image_of(config: dict[str, Any], teacher: ClipModel) -> dict[str, Any]:
    """Return a student's configuration with the teacher's image tower and preprocessing, but its own size of images.

    Args:
        config: of `student_config`.
    """
    model_cfg, preprocess_cfg = config["model_cfg"], config["preprocess_cfg"]
    own, source = model_cfg["vision_cfg"], teacher.model_cfg["vision_cfg"]
    if _architecture(own) != _architecture(source):
        raise ConfigError(
            f"The student's image tower is {_architecture(own)}, and that of {teacher.name} is "
            f"{_architecture(source)}; expected the same.",
            hint=_HINT,
        )
    if model_cfg["embed_dim"] != teacher.embedding_size:
        raise ConfigError(
            f"The student's embedding size is {model_cfg['embed_dim']}, and that of {teacher.name} is "
            f"{teacher.embedding_size}; expected the same: the image tower is to start as the teacher's.",
            hint=f"{{embedding_size}} {teacher.embedding_size}, or omit {{pretrained_image}}",
        )
    vision_cfg = {**source, "timm_model_pretrained": False} if _TIMM_NAME in source else source
    model_cfg = {**model_cfg, "vision_cfg": {**vision_cfg, "image_size": own["image_size"]}}
    quick_gelu = quick_gelu_of(teacher.model.get_submodule("visual"))
    if quick_gelu is not None:
        model_cfg["quick_gelu"] = quick_gelu
    preprocess_cfg = {**msgspec.to_builtins(teacher.preprocessing), "size": preprocess_cfg["size"]}
    return {**config, "model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def copy_image_tower(student: ClipModel, teacher: ClipModel) -> str:
    """Give the student the teacher's image tower and logit scale; return a sentence that says so."""
    try:
        student.model.get_submodule("visual").load_state_dict(teacher.model.get_submodule("visual").state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"The image tower of {teacher.name} does not fit the student's: {str(error).splitlines()[-1].strip()}",
            hint=f"{{image_size}} {teacher.preprocessing.size[0]}, or omit {{pretrained_image}}",
        ) from error
    _require_same_features(student, teacher)
    with torch.no_grad():
        student.model.get_parameter("logit_scale").copy_(teacher.model.get_parameter("logit_scale"))
    return f"the image tower is initialised from that of {teacher.name}"


@torch.no_grad()
def _require_same_features(student: ClipModel, teacher: ClipModel) -> None:
    # Not from the global generator, which draws the student's other weights.
    pixels = torch.randn(2, 3, *student.preprocessing.size, generator=torch.Generator().manual_seed(0))
    features = []
    for model in (student.model, teacher.model):
        with evaluation_mode(model):
            features.append(ImageTower(model)(pixels.to(next(model.parameters()).device)).cpu())
    require_equal(*features, what=f"image tower with the weights of {teacher.name}", hint="omit {pretrained_image}")


def _architecture(vision_cfg: dict[str, Any]) -> str:
    """Return what has to agree, in words."""
    if name := vision_cfg.get(_TIMM_NAME):
        return str(name)
    parts = [f"{key} {vision_cfg[key]}" for key in ("width", "layers", "patch_size") if key in vision_cfg]
    return f"open_clip's of {', '.join(parts)}" if parts else "another one of open_clip's"
