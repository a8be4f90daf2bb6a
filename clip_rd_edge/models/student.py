"""Compact students, built by open_clip: a timm trunk or small ViT, a projection, and a small CLIP text tower."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

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


TIMM, TEACHER = "timm", "teacher"
_BLOCKS = "transformer.resblocks."
# What may be left random where shapes differ: it only fits the one width of embeddings it was trained for.
_PROJECTIONS = {"text_projection", "text_projection.weight"}


def start_image_tower(student: ClipModel, source: str) -> str:
    """Load weights into the student's timm trunk; its projection stays random. Returns what was done, in a sentence.

    Args:
        source: `timm` for the weights that timm publishes for the trunk, else a file of such weights (.safetensors,
            .pth), with or without its classifier.

    Raises:
        ConfigError: the image tower is no timm trunk, or the weights do not fit it.
        InputError: there is no such file, or the download failed.
    """
    name = student.model_cfg["vision_cfg"].get("timm_model_name")
    if name is None:
        raise ConfigError(
            f"The image tower of {student.name} is no timm trunk, and only those have pretrained image weights here.",
            hint="leave --pretrained-image away, or take a timm name such as vit_tiny_patch16_224",
        )
    published = _timm_weights(name, source)
    trunk = student.model.get_submodule("visual.trunk")
    own = trunk.state_dict()
    classifier = _classifier_names(trunk)
    missing = [k for k, v in own.items() if k not in classifier and getattr(published.get(k), "shape", None) != v.shape]
    if missing:
        raise ConfigError(f"The image weights {source} do not fit {name}: {missing[0]} is missing or of another shape.")
    trunk.load_state_dict({k: published[k] if k not in classifier else v for k, v in own.items()})
    return f"the image tower starts from {f'the weights that timm publishes for {name}' if source == TIMM else source}"


def start_text_tower(student: ClipModel, source: str, teacher: ClipModel | None) -> str:
    """Load weights into the student's text tower, of its layers evenly spaced ones of the source's.

    Args:
        source: `teacher`, or the file of an open_clip checkpoint.

    Returns:
        what was done, in a sentence.

    Raises:
        ConfigError: the source is no open_clip text transformer, or of another width or vocabulary.
        InputError: there is no such file, or there is no teacher.
    """
    if source == TEACHER and teacher is None:
        raise InputError("--pretrained-text teacher needs a teacher.", hint="name one with --teacher, or give a file")
    found = _text_state(teacher.model.state_dict() if teacher and source == TEACHER else _read(source))
    text = student.model.get_submodule("text")
    layers, theirs = _layer_count(text.state_dict()), _layer_count(found)
    if not theirs:
        raise ConfigError(f"The text weights of {source} are not those of an open_clip text transformer.")
    if layers > theirs:
        raise ConfigError(
            f"The student's text tower has {layers} layers and the weights of {source} only {theirs}.",
            hint=f"--text WIDTHx{theirs}, or fewer layers",
        )
    chosen = evenly_spaced(layers, of=theirs)
    start = _fitted(text, _with_layers(found, chosen), source)
    text.load_state_dict(start, strict=False)
    which = "all" if layers == theirs else f"layers {', '.join(str(i + 1) for i in chosen)}"
    return f"the text tower starts from {which} of the {theirs} layers of {source}"


def evenly_spaced(count: int, *, of: int) -> list[int]:
    """`count` of the numbers 0 to `of` − 1 at even distances, the first and the last among them."""
    return [round(i * (of - 1) / (count - 1)) for i in range(count)] if count > 1 else [0]


def _timm_weights(name: str, source: str) -> dict[str, Tensor]:
    import timm

    if source != TIMM and not Path(source).is_file():
        raise InputError(f"There is no file of image weights {source}.", hint="give its path, or: timm")
    overlay = None if source == TIMM else {"file": source}
    try:
        return dict(timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict())
    except Exception as error:  # timm, the hub and torch raise all kinds
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if source == TIMM:
            raise InputError(
                f"timm's weights for {name} could not be fetched: {first_line}.",
                hint="fetch them where there is a network, and give the file: --pretrained-image FILE",
            ) from error
        raise ConfigError(f"The image weights {source} do not fit {name}: {first_line}.") from error


def _classifier_names(trunk: nn.Module) -> set[str]:
    """Names of a trunk's classifier, which open_clip may have made the projection to embeddings."""
    named: Any = getattr(trunk, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = (named,) if isinstance(named, str) else tuple(named)
    return {k for k in trunk.state_dict() if any(k.startswith(f"{prefix}.") for prefix in prefixes)}


def _read(source: str) -> Mapping[str, Tensor]:
    import open_clip

    if not Path(source).is_file():
        raise InputError(
            f"There is no file of text weights {source}.", hint="give an open_clip checkpoint's path, or: teacher"
        )
    try:
        state: Mapping[str, Tensor] = open_clip.factory.load_state_dict(source)
    except Exception as error:  # a damaged file raises anything
        raise InputError(f"The text weights {source} cannot be read: {error}.") from error
    return state


def _text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tower's part of a CLIP model's weights: under `text.`, or in older models beside the image tower's."""
    of_tower = {k.removeprefix("text."): v for k, v in state.items() if k.startswith("text.")}
    return of_tower or {k: v for k, v in state.items() if not k.startswith("visual.")}


def _layer_count(state: Mapping[str, Tensor]) -> int:
    return len({k.removeprefix(_BLOCKS).split(".")[0] for k in state if k.startswith(_BLOCKS)})


def _with_layers(state: Mapping[str, Tensor], chosen: list[int]) -> dict[str, Tensor]:
    """The weights with only the chosen layers, numbered anew."""
    kept = {k: v for k, v in state.items() if not k.startswith(_BLOCKS)}
    for new, old in enumerate(chosen):
        prefix = f"{_BLOCKS}{old}."
        kept |= {f"{_BLOCKS}{new}.{k.removeprefix(prefix)}": v for k, v in state.items() if k.startswith(prefix)}
    return kept


def _fitted(text: nn.Module, found: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """What of `found` the tower takes: as many positions as it has, and the projection where its shape is right."""
    start: dict[str, Tensor] = {}
    for name, own in text.named_parameters():
        theirs = found.get(name, torch.empty(0))
        if name == "positional_embedding":
            theirs = theirs[: len(own)]
        if theirs.shape == own.shape:
            start[name] = theirs
        elif name not in _PROJECTIONS:
            raise ConfigError(
                f"The text weights of {source} do not fit the student's: {name} is {_shape(theirs)} there and "
                f"{_shape(own)} here.",
                hint=f"--text {len(found.get('ln_final.weight', ()))}xLAYERS gives the student a tower of that width",
            )
    return start


def _shape(tensor: Tensor) -> str:
    return " × ".join(map(str, tensor.shape)) if tensor.numel() else "missing"
