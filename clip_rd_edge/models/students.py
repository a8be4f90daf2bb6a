"""Build and initialise compact students: a timm trunk or small ViT, a projection, and a small CLIP text tower."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.errors import ConfigError, InputError, first_line, near_matches, quoted
from clip_rd_edge.models.classifiers import (
    CLASSIFIERS,
    load_classifier,
    mismatch,
    read_weights,
    register_activation,
    unknown_weights,
)
from clip_rd_edge.models.clip import ClipModel, ImageTower, evaluation_mode, float32_on_cpu, quick_gelu_of
from clip_rd_edge.models.hub import fetching, refuse_other_places, require_bounded
from clip_rd_edge.models.names import CONFIGS, architectures, parse_name, preset_names
from clip_rd_edge.utils.paths import exists
from clip_rd_edge.utils.structs import convert, read_json

_HEAD_WIDTH = 64  # as in CLIP
VOCABULARY_SIZE = 49_408  # of CLIP


class TextSize(NamedTuple):
    """Size of a CLIP text transformer."""

    width: int
    layers: int


# `standard` is the text tower of the published students; the smaller ones are for short labels and small devices.
TEXT_SIZES = {"tiny": TextSize(128, 3), "small": TextSize(256, 6), "standard": TextSize(384, 12)}


def text_size(name: str) -> TextSize:
    """Return a size given by name or as WIDTHxLAYERS."""
    if name in TEXT_SIZES:
        return TEXT_SIZES[name]
    size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if size is None or int(size[1]) % _HEAD_WIDTH:
        gone = ", but there is no such folder" if Path(name).name != name and not exists(name) else ""
        raise ConfigError(
            f"The text tower is {name!r}{gone}; expected one of {', '.join(TEXT_SIZES)}, or WIDTHxLAYERS such as "
            f"512x6, where the width is a multiple of {_HEAD_WIDTH}; or teacher, or the folder of a model."
        )
    return TextSize(int(size[1]), int(size[2]))


def student_config(
    student: str, *, embedding_size: int, image_size: int = 224, text: str = "standard", context_length: int = 77
) -> dict[str, Any]:
    """Return the open_clip configuration of a student, `model_cfg` and `preprocess_cfg`.

    Args:
        student: a preset, the name of any timm trunk, `open_clip:NAME` for the image tower of that architecture, or the
            path of a JSON file with `vision_cfg` and `preprocess_cfg` as in open_clip's configurations, and
            `quick_gelu` where the image tower has it.
        embedding_size: D; the teacher's D if their embeddings are compared entry by entry.
        image_size: edge of the square input in pixels.
        text: size of the text tower; see `text_size`.
        context_length: T, the number of token ids per caption.
    """
    size = text_size(text)
    preset = _preset(student)
    own_size = preset.vision_cfg.get("image_size", image_size)
    if own_size != image_size:
        raise ConfigError(
            f"{student} has the image_size {own_size}; {image_size} was asked for.",
            hint=f"{{image_size}} {own_size}, or omit image_size in the file",
        )
    return {
        "model_cfg": {
            "embed_dim": embedding_size,
            "vision_cfg": {**preset.vision_cfg, "image_size": image_size},
            "text_cfg": {
                "context_length": context_length,
                "vocab_size": VOCABULARY_SIZE,
                "width": size.width,
                "heads": size.width // _HEAD_WIDTH,
                "layers": size.layers,
            },
            "custom_text": True,
            **({"quick_gelu": True} if preset.quick_gelu else {}),
        },
        "preprocess_cfg": {"size": [image_size, image_size], **msgspec.to_builtins(preset.preprocess_cfg)},
    }


def student_preprocessing(student: str, *, image_size: int = 224) -> Preprocessing:
    """Return the preprocessing of a new student, as in `student_config`, but for any size; raises as that does."""
    cfg = {"size": [image_size, image_size], **msgspec.to_builtins(_preset(student).preprocess_cfg)}
    return convert(cfg, Preprocessing, source="the student's preprocess_cfg")


@float32_on_cpu()
def build_student(config: dict[str, Any], *, name: str) -> ClipModel:
    """Build a student with random weights from torch's default generator; `config` is that of `student_config`."""
    import open_clip

    model_cfg = dict(config["model_cfg"])
    arguments = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    preprocessing = convert(config["preprocess_cfg"], Preprocessing, source="the student's preprocess_cfg")
    height, width = preprocessing.size
    try:
        model = open_clip.CustomTextCLIP(**arguments)
        with torch.no_grad():  # a trunk that does not support the size fails here, not in the middle of a run
            model.eval().encode_image(torch.zeros(2, 3, height, width)).reshape(2, model_cfg["embed_dim"])
    except Exception as error:  # trunks raise many types
        raise ConfigError(
            f"The student {name} cannot be built at {height} × {width} pixels: {first_line(error)}.",
            hint="{image_size} 224, for which most image towers are made" if height != 224 else "",
        ) from error
    open_clip.model.set_model_preprocess_cfg(model, config["preprocess_cfg"])
    tokenizer = open_clip.SimpleTokenizer(context_length=model_cfg["text_cfg"]["context_length"])
    return ClipModel(name, model.train(), tokenizer, preprocessing, model_cfg)


class _PresetPreprocessing(msgspec.Struct, forbid_unknown_fields=True):
    mean: list[float]
    std: list[float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0


class _Preset(msgspec.Struct, forbid_unknown_fields=True):
    """An image tower without its size."""

    vision_cfg: dict[str, Any]
    preprocess_cfg: _PresetPreprocessing
    quick_gelu: bool = False


def require_student(student: str) -> None:
    """Refuse the name of a new student that `student_config` would refuse; nothing is built."""
    if _known_preset(student) is None:
        _require_timm_trunk(student)


def _preset(student: str) -> _Preset:
    return _known_preset(student) or _timm_preset(student)


def _known_preset(student: str) -> _Preset | None:
    """Return the image tower that a file of ours, of the user or of open_clip describes; None for timm's."""
    named = parse_name(student)
    if named.kind == "open_clip":
        return _open_clip_preset(named.name)
    if named.kind not in ("file", "preset"):
        return None
    path = Path(named.name) if named.kind == "file" else CONFIGS / f"{named.name}.json"
    preset = read_json(path, _Preset)
    require_bounded({"vision_cfg": preset.vision_cfg}, path)
    refuse_other_places({"vision_cfg": preset.vision_cfg}, str(path), folder=path.parent)
    if "timm_model_name" in preset.vision_cfg:  # only --pretrained-image asks for weights
        preset.vision_cfg["timm_model_pretrained"] = False
        register_activation(preset.vision_cfg["timm_model_name"])
    return preset


def _open_clip_preset(name: str) -> _Preset:
    """Return the image tower of open_clip's architecture, which sees images as its first published weights do."""
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise InputError(
            f"No architecture {quoted(name)} in open_clip.{near_matches(name, architectures())}",
            hint="{student} open_clip:NAME, or NAME@TAG for a trained model",
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    published = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
    defaults = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    keys = ("mean", "std", "interpolation", "resize_mode")
    seen = defaults | {key: published[key] for key in keys if key in published}
    preprocess_cfg = msgspec.convert(
        {**seen, "mean": list(seen["mean"]), "std": list(seen["std"])}, _PresetPreprocessing
    )
    vision_cfg = {key: value for key, value in config["vision_cfg"].items() if key != "image_size"}
    if "timm_model_name" in vision_cfg:
        vision_cfg["timm_model_pretrained"] = False
    return _Preset(vision_cfg, preprocess_cfg, quick_gelu=config.get("quick_gelu", False))


def _require_timm_trunk(trunk: str) -> None:
    import timm

    register_activation(trunk)
    if not timm.is_model(trunk):
        known = [*preset_names(), *timm.list_models()]
        of_open_clip = trunk in architectures()
        ways = f"{trunk}@TAG for its published weights, open_clip:{trunk} for its image tower, untrained"
        raise InputError(
            f"No student named {quoted(trunk)}: it is neither a preset nor a timm model."
            f"{'' if of_open_clip else near_matches(trunk, known)}",
            hint=ways if of_open_clip else f"presets: {', '.join(preset_names())}",
        )
    try:
        timm.get_pretrained_cfg(trunk)
    except RuntimeError as error:  # `is_model` knows architectures alone
        raise unknown_weights(trunk) from error


def _timm_preset(trunk: str) -> _Preset:
    """Return the configuration of any timm trunk, with the mean and standard deviation of its pretrained weights."""
    import timm

    _require_timm_trunk(trunk)
    # Not on the meta device: timm before 1.0.21 fails on it with most transformers, and later releases with RegNets.
    with torch.random.fork_rng(devices=[]):  # the student's own initial weights are drawn after this
        module = timm.create_model(trunk, num_classes=0)
    # open_clip's linear projection expects `num_features`, but some trunks (MobileNetV3 and V4) widen again after
    # pooling. For these, timm's own classifier becomes the projection.
    widens = getattr(module, "head_hidden_size", module.num_features) != module.num_features
    if not (own := getattr(module, "default_cfg", None)):
        raise ConfigError(
            f"The image tower {trunk} has no default_cfg, as models of timm have.",
            hint='give the module one, such as: default_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}',
        )
    return _Preset(
        vision_cfg={
            "timm_model_name": trunk,
            "timm_model_pretrained": False,
            "timm_pool": "avg" if widens else "",
            "timm_proj": "" if widens else "linear",
        },
        preprocess_cfg=_PresetPreprocessing(mean=list(own["mean"]), std=list(own["std"])),
    )


TIMM, PACKAGE = "timm", "package"
TEACHER = "teacher"  # as the source of a tower's weights, or of the whole tower


def init_image_tower(student: ClipModel, source: str) -> str:
    """Initialise the student's timm trunk with pretrained weights; the projection stays random.

    Args:
        source: `timm` for the weights that timm publishes for the trunk; `package` for those of an installed package of
            the extra `emoji`, where there is one; or a file with timm's weights (.safetensors, .pth), with or without
            a classifier, of any classes.
    """
    import timm

    name = student.model_cfg["vision_cfg"].get(_TIMM_NAME)
    if name is None:
        raise ConfigError(
            f"The image tower of {student.name} is not a timm trunk; {{pretrained_image}} supports only timm trunks.",
            hint="omit {pretrained_image}, or choose a timm name such as vit_tiny_patch16_224",
        )
    if source == PACKAGE:
        if name not in CLASSIFIERS:
            raise ConfigError(
                f"There is no package with weights of {name}; expected one of {', '.join(CLASSIFIERS)}.",
                hint="{pretrained_image} timm, or a file",
            )
        published = load_classifier(name).model.state_dict()
    elif source == TIMM:
        with fetching(f"timm's weights for {name}", option="pretrained_image"):
            published = timm.create_model(name, pretrained=True).state_dict()
    else:
        published = _weights_of_file(name, source)
    trunk = student.model.get_submodule("visual.trunk")
    classifier = _classifier_names(trunk)
    own = trunk.state_dict()
    given = {key: published[key] for key in own if key in published and key not in classifier}
    try:
        trunk.load_state_dict({**given, **{key: own[key] for key in classifier}})
    except RuntimeError as error:
        raise ConfigError(f"The image weights {source} do not match {name}: {mismatch(error)}") from error
    origin = {TIMM: f"the timm weights of {name}", PACKAGE: f"the packaged weights of {name}"}.get(source, source)
    return f"the image tower is initialised from {origin}"


def _weights_of_file(name: str, path: str) -> dict[str, Tensor]:
    """Return the weights in a file by timm's names, into which timm translates those of some architectures."""
    import timm

    weights = read_weights(Path(path), hint="pass a file, or: timm, package")
    with torch.random.fork_rng(devices=[]):
        published: Any = timm.create_model(name)
    classes = next((len(weights[key]) for key in _classifier_names(published) if key in weights), 0)
    errors = list[Exception]()
    # A classifier that seems to be missing may have a name that timm translates: then it has the published classes.
    for count in dict.fromkeys((classes, published.num_classes)):
        overlay = {"file": path, "num_classes": count}
        try:
            model = timm.create_model(name, pretrained=True, num_classes=count, pretrained_cfg_overlay=overlay)
        except Exception as error:  # noqa: BLE001 — timm and torch raise many types
            errors.append(error)
        else:
            return dict(model.state_dict())
    raise ConfigError(
        f"The image weights {path} do not match {name}: {mismatch(errors[0])}",
        hint=f"pass weights of timm's {name}, with any classifier or none",
    ) from errors[0]


def _classifier_names(trunk: nn.Module) -> set[str]:
    """Return the parameter names of a trunk's classifier, which may serve as the projection to embeddings."""
    classifiers: Any = getattr(trunk, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    return {k for k in trunk.state_dict() if any(k.startswith(f"{prefix}.") for prefix in prefixes)}


_MIN_COSINE = 0.9999  # between the features of a tower and those of its copy
_TIMM_NAME = "timm_model_name"


def require_same_image_tower(model_cfg: dict[str, Any], source: dict[str, Any], *, name: str) -> None:
    """Refuse a student whose image tower is of another kind than the teacher's, by the `model_cfg` of both."""
    size, towers = source["embed_dim"], map(_architecture, (model_cfg["vision_cfg"], source["vision_cfg"]))
    for what, (own, other), hint in (
        ("image tower", towers, "name the teacher's architecture with {student}"),
        ("embedding size", (model_cfg["embed_dim"], size), f"{{embedding_size}} {size}"),
    ):
        if own != other:
            raise ConfigError(
                f"The student's {what} is {own}, and that of {name} is {other}; expected the same: the image tower is "
                "to start as the teacher's.",
                hint=f"{hint}, or omit {{pretrained_image}}",
            )


def with_image_of(config: dict[str, Any], teacher: ClipModel) -> dict[str, Any]:
    """Return a student's configuration with the teacher's image tower and preprocessing, but its own size of images."""
    model_cfg, preprocess_cfg = config["model_cfg"], config["preprocess_cfg"]
    require_same_image_tower(model_cfg, teacher.model_cfg, name=teacher.name)
    source = teacher.model_cfg["vision_cfg"]
    vision_cfg = {**source, "timm_model_pretrained": False} if _TIMM_NAME in source else source
    model_cfg = {**model_cfg, "vision_cfg": {**vision_cfg, "image_size": model_cfg["vision_cfg"]["image_size"]}}
    quick_gelu = quick_gelu_of(teacher.model.get_submodule("visual"))
    if quick_gelu is not None:
        model_cfg["quick_gelu"] = quick_gelu
    preprocess_cfg = {**msgspec.to_builtins(teacher.preprocessing), "size": preprocess_cfg["size"]}
    return {**config, "model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def copy_image_tower(student: ClipModel, teacher: ClipModel) -> str:
    """Give the student the teacher's image tower and logit scale; return a sentence about it."""
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


def require_equal(features: Tensor, expected: Tensor, *, what: str, hint: str) -> None:
    """Check that a student's tower with its teacher's weights returns its features; (N, D) each, L2-normalised."""
    cosine = float((features * expected).sum(dim=1).min())
    if not cosine >= _MIN_COSINE:
        raise ConfigError(
            f"The student's {what} returns other features (cosine {cosine:.4f}, expected at least {_MIN_COSINE}).",
            hint=hint,
        )


def _architecture(vision_cfg: dict[str, Any]) -> str:
    if name := vision_cfg.get(_TIMM_NAME):
        return str(name)
    parts = [f"{key} {vision_cfg[key]}" for key in ("width", "layers", "patch_size") if key in vision_cfg]
    return f"open_clip's of {', '.join(parts)}" if parts else "another one of open_clip's"
