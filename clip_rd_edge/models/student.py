"""Compact students, built by open_clip: a timm trunk or small ViT, a projection, and a small CLIP text tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from clip_rd_edge.contract.preprocess import Preprocessing
from clip_rd_edge.errors import ConfigError, InputError, near_matches
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.utils.io import convert

CONFIGS = Path(__file__).parent / "configs"


_HEAD = 64  # numbers an attention head, as in CLIP


class TextSize(msgspec.Struct, frozen=True):
    """A CLIP text transformer's size."""

    width: int
    layers: int


# `standard` is the text tower of the published students; the smaller ones suit short labels and small devices.
TEXT_SIZES = {
    "tiny": TextSize(width=128, layers=3),
    "small": TextSize(width=256, layers=6),
    "standard": TextSize(width=384, layers=12),
}


def text_size(name: str) -> TextSize:
    """A size by name, or as WIDTHxLAYERS.

    Raises:
        ConfigError: it is neither, or the width is no multiple of 64.
    """
    if name in TEXT_SIZES:
        return TEXT_SIZES[name]
    width, _, layers = name.partition("x")
    if not (width.isdecimal() and layers.isdecimal()) or int(layers) < 1 or int(width) < _HEAD or int(width) % _HEAD:
        raise ConfigError(
            f"The text tower is {name!r}; expected one of {', '.join(TEXT_SIZES)}, or WIDTHxLAYERS such as 512x6, the "
            f"width a multiple of {_HEAD}."
        )
    return TextSize(width=int(width), layers=int(layers))


def preset_names() -> list[str]:
    """Names of the image trunks that are known to work; any other timm name is taken, too."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def student_config(
    student: str, *, embedding_size: int, image_size: int = 224, text: str = "standard", context_length: int = 77
) -> dict[str, Any]:
    """open_clip's configuration (`model_cfg` and `preprocess_cfg`) of a student.

    Args:
        student: a preset, any timm trunk by name, or the path of a JSON file with an open_clip `vision_cfg`.
        embedding_size: D, the teacher's width where the two are compared entry by entry.
        image_size: edge of the square input, in pixels.
        text: see `text_size`.
        context_length: T, the token ids a caption.

    Raises:
        InputError: the student is unknown (with near matches).
        ConfigError: there is no such text size.
    """
    size = text_size(text)
    preset = _preset(student)
    return {
        "model_cfg": {
            "embed_dim": embedding_size,
            "vision_cfg": {**preset["vision_cfg"], "image_size": image_size},
            "text_cfg": {
                "context_length": context_length,
                "vocab_size": 49408,
                "width": size.width,
                "heads": size.width // _HEAD,
                "layers": size.layers,
            },
            "custom_text": True,
        },
        "preprocess_cfg": {
            "size": [image_size, image_size],
            **preset["preprocess_cfg"],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def build_student(config: dict[str, Any], *, name: str) -> ClipModel:
    """A student with random weights from torch's generator; `config` as `student_config` returns it.

    Raises:
        ConfigError: open_clip cannot build it, such as a trunk that does not take this image size.
    """
    import open_clip
    import torch

    model_cfg = dict(config["model_cfg"])
    arguments = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    preprocessing = convert(config["preprocess_cfg"], Preprocessing, source="the student's preprocess_cfg")
    height, width = preprocessing.size
    try:
        model = open_clip.CustomTextCLIP(**arguments)
        with torch.no_grad():  # a trunk made for another size says so here, not in the middle of a run
            features = model.eval().encode_image(torch.zeros(2, 3, height, width))
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"The student {name} cannot be built at {height} × {width} pixels: {first_line}.") from error
    if features.shape != (2, model_cfg["embed_dim"]):
        raise ConfigError(f"The student {name} gives {tuple(features.shape)} for 2 pictures; expected (2, D).")
    open_clip.model.set_model_preprocess_cfg(model, config["preprocess_cfg"])
    tokenizer = open_clip.SimpleTokenizer(context_length=model_cfg["text_cfg"]["context_length"])
    return ClipModel(
        name=name, model=model.train(), tokenizer=tokenizer, preprocessing=preprocessing, model_cfg=model_cfg
    )


def _preset(student: str) -> dict[str, Any]:
    path = Path(student) if student.endswith(".json") else CONFIGS / f"{student}.json"
    if path.is_file():
        preset: dict[str, Any] = json.loads(path.read_text())
        if not {"vision_cfg", "preprocess_cfg"} <= preset.keys():
            raise ConfigError(f"{path} has no 'vision_cfg' and 'preprocess_cfg'.")
        return preset
    return _timm_preset(student)


def _timm_preset(trunk: str) -> dict[str, Any]:
    """Any timm trunk, with the mean and deviation that its pretrained weights were made for."""
    import timm
    import torch

    if not timm.is_model(trunk):
        known = [*preset_names(), *timm.list_models()]
        raise InputError(
            f"There is no student {trunk!r}: neither a preset nor a timm model.{near_matches(trunk, known)}",
            hint=f"presets: {', '.join(preset_names())}",
        )
    with torch.device("meta"):
        built = timm.create_model(trunk, num_classes=0)
    # open_clip's linear projection takes `num_features`, but some trunks widen once more after pooling (MobileNetV3 and
    # V4): there timm's own classifier is made the projection.
    widens = getattr(built, "head_hidden_size", built.num_features) != built.num_features
    return {
        "vision_cfg": {
            "timm_model_name": trunk,
            "timm_model_pretrained": False,
            "timm_pool": "avg" if widens else "",
            "timm_proj": "" if widens else "linear",
        },
        "preprocess_cfg": {"mean": list(built.default_cfg["mean"]), "std": list(built.default_cfg["std"])},
    }
