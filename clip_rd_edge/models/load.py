"""Load open_clip models from architectures with checkpoints, folders or the Hugging Face hub, and save them."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import torch

from clip_rd_edge.bundle.manifest import inner_bundles
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.bundle.runs import (
    CONFIG_FILE,
    DISTILLATION_FILE,
    LOCAL_DIR,
    STUDENT_FOLDER,
    TRANSFORMERS_CONFIG,
    WEIGHTS_FILE,
    model_folder,
    refuse_unfinished_run,
    training_record_path,
)
from clip_rd_edge.errors import ConfigError, InputError, first_line, near_matches, quoted
from clip_rd_edge.models.classifiers import register_activation
from clip_rd_edge.models.clip import ClipModel, float32_on_cpu
from clip_rd_edge.models.hub import (
    HUB_IF_REACHABLE,
    NO_STRANGERS,
    REMOTE_CODE,
    StrangeFileError,
    refuse_other_places,
    require_bounded,
)
from clip_rd_edge.models.names import HUB, ModelName, parse_name
from clip_rd_edge.utils.files import require_utf8_path
from clip_rd_edge.utils.outputs import new_folder
from clip_rd_edge.utils.paths import Typed, exists, is_file, is_folder
from clip_rd_edge.utils.process import quiet_logs
from clip_rd_edge.utils.structs import convert, read_json
from clip_rd_edge.utils.text import shown_sources


@float32_on_cpu()
def load_clip(spec: Typed, *, pretrained: Typed | None = None, separate_text: bool = False) -> ClipModel:
    """Load a model with its tokenizer and preprocessing, in evaluation mode, on the CPU.

    Args:
        spec: a trained model, as `models.names` has it.
        pretrained: for an architecture without a tag of its own, an open_clip tag or a checkpoint file.
        separate_text: build the text tower as a module of its own, as students have it, also where open_clip's model
            has its parts at the top level.
    """
    import open_clip

    named = parse_name(spec, weights=pretrained)
    model_cfg = _known_config(named)
    folder = Path(named.name) if named.kind == "folder" else None
    name = f"{LOCAL_DIR}{folder}" if folder else named.name
    overrides = _relocated_text_cfg(folder, model_cfg) if folder else {}
    has_tag = named.weights is not None and not exists(named.weights)
    needs_hub = named.kind == "hub" or has_tag or (not folder and "hf_tokenizer_name" in model_cfg["text_cfg"])
    with quiet_logs(logging.ERROR), NO_STRANGERS, HUB_IF_REACHABLE if needs_hub else nullcontext():
        try:
            if named.kind == "hub":
                model_cfg = open_clip.get_model_config(name)
                require_bounded(model_cfg, name)
                refuse_other_places(model_cfg, name)
                register_activation(model_cfg.get("vision_cfg", {}).get("timm_model_name"))
            model = open_clip.create_model(
                name,
                pretrained=named.weights,
                require_pretrained=True,
                pretrained_text=False,
                force_quick_gelu=model_cfg.get("quick_gelu", False),
                force_custom_text=separate_text,
                force_preprocess_cfg=_preprocessing_of_tags(named),
                **overrides,
            )
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # open_clip, the hub client and torch raise many types
            raise _loading_error(named, model_cfg, error) from error
    if separate_text and hasattr(model, "text"):
        model_cfg = {**model_cfg, "custom_text": True}
    record = training_record_path(folder)
    usage = _Usage() if record is None else read_json(record, _Usage)
    return ClipModel(
        name=_display_name(named),
        model=model.eval(),
        tokenizer=tokenizer,
        preprocessing=preprocessing_of(model),
        model_cfg=model_cfg,
        templates=usage.templates,
        labels=usage.labels,
    )


def known_config(spec: Typed, *, pretrained: Typed | None = None) -> dict[str, Any]:
    """Return the `model_cfg` of a trained model on this machine; empty for one of the hub, which is fetched later.

    A model that is not there is refused; nothing is fetched, and no weights are read. Arguments as for `load_clip`.
    """
    return _known_config(parse_name(spec, weights=pretrained))


def _known_config(named: ModelName) -> dict[str, Any]:
    folder = Path(named.name)
    if named.kind == "folder" and is_file(folder / CONFIG_FILE):
        return _model_cfg_in(folder)
    return {} if named.kind == "hub" else _architecture(named)


class _OpenClipConfig(TypedDict):
    model_cfg: dict[str, Any]


def _model_cfg_in(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    model_cfg = read_json(path, _OpenClipConfig)["model_cfg"]
    require_bounded(model_cfg, path)
    refuse_other_places(model_cfg, str(path), folder=folder)
    register_activation(model_cfg.get("vision_cfg", {}).get("timm_model_name"))
    return model_cfg


def preprocessing_of(model: Any) -> Preprocessing:
    """Return the `preprocess_cfg` of an open_clip model as a `Preprocessing`."""
    raw = {k: v for k, v in model.visual.preprocess_cfg.items() if k in Preprocessing.__struct_fields__}
    size = raw["size"]
    raw["size"] = [size, size] if isinstance(size, int) else list(size)
    if raw.get("interpolation") == "random":  # in training; open_clip evaluates so
        raw["interpolation"] = "bicubic"
    raw["mean"], raw["std"] = [float(x) for x in raw["mean"]], [float(x) for x in raw["std"]]
    return convert(raw, Preprocessing, source="the model's preprocess_cfg")


def _architecture(named: ModelName) -> dict[str, Any]:
    """Return open_clip's configuration of an architecture that is named with weights; refuse all else."""
    import open_clip

    name, weights = named.name, named.weights
    config: dict[str, Any] | None = open_clip.get_model_config(name) if named.kind in ("open_clip", "trunk") else None
    if config is None:
        raise _no_model(named, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(name)
    tag_cfg = open_clip.get_pretrained_cfg(name, weights) if weights else {}
    if weights is None or not (tag_cfg or exists(weights)):
        what = (
            "was named without weights" if weights is None else f"has no weights {quoted(weights)}, nor are they a file"
        )
        raise InputError(
            f"The architecture {name} {what}.{near_matches(weights or '', tags)}",
            hint=f"{name}@TAG, of {', '.join(tags)}; or {name}@FILE" if tags else f"{name}@FILE, with a checkpoint",
        )
    # open_clip only warns where weights were trained with another activation than the architecture's.
    return {**config, "quick_gelu": True} if tag_cfg.get("quick_gelu") else config


def _no_model(named: ModelName, architectures: list[str]) -> InputError:
    name = named.name
    refuse_unfinished_run(name)
    if named.kind == "bundle":
        return InputError(
            f"{name} is a bundle, which has no weights that PyTorch can load.",
            hint="name the model that it was exported from: a run's folder, or one that open_clip can load",
        )
    if named.kind in ("preset", "file"):
        return InputError(
            f"{name} is the image tower of a new student, without weights; expected a trained model.",
            hint="name the folder of a run, or an open_clip NAME@TAG",
        )
    if is_folder(name):
        return InputError(
            f"The folder {name} holds no model: it has no {CONFIG_FILE}.",
            hint=inner_bundles(Path(name)) or "name the folder of a run, or of a model that open_clip can load",
        )
    return InputError(
        f"No model named {quoted(name)}: it is neither a folder nor an open_clip architecture."
        f"{near_matches(name, architectures)}",
        hint="check the path; open_clip.list_models() lists the architectures",
    )


def _preprocessing_of_tags(named: ModelName) -> dict[str, Any] | None:
    """Return the preprocessing of an architecture's published weights, for a file of weights, which has none.

    None where they differ, and for weights with a tag, for which open_clip has its own.
    """
    import open_clip

    if named.weights is None or open_clip.get_pretrained_cfg(named.name, named.weights):
        return None
    tags = open_clip.list_pretrained_tags_by_model(named.name)
    published = [open_clip.get_pretrained_cfg(named.name, tag) for tag in tags]
    seen = [{key: cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")} for cfg in published]
    return seen[0] if seen and all(one == seen[0] for one in seen) else None


def _relocated_text_cfg(folder: Path, model_cfg: dict[str, Any]) -> dict[str, Any]:
    """Return overrides that load a Hugging Face text tower's config.json from the model's own folder, if it is there.

    open_clip accepts `hf_model_name` only as a hub name or an absolute path, so a folder that was moved would otherwise
    look for its own files on the network.
    """
    text_cfg = model_cfg.get("text_cfg", {})
    if "hf_model_name" not in text_cfg or not (folder / TRANSFORMERS_CONFIG).is_file():
        return {}
    return {"text_cfg": {**text_cfg, "hf_model_name": str(folder.resolve()), "hf_model_pretrained": False}}


class _Usage(msgspec.Struct):
    """What distillation.json records about the model's use; see `ClipModel`."""

    templates: tuple[str, ...] = ("{}",)
    labels: tuple[str, ...] = ()


_TRAINING_FACTS = ("recipe", "teacher", "data", "image_source", "pairs", "images", "texts", "steps", "seed", "date")


def training_facts(spec: str) -> dict[str, str]:
    """Return what distillation.json in a model's folder records about its training, by name; empty without it."""
    path = training_record_path(model_folder(spec))
    if path is None:
        return {}
    record = read_json(path, dict[str, Any])
    # Of paths only the last part: the others say where a file was on the machine that trained, and to whom it belonged.
    facts = {name: record.get(name) for name in _TRAINING_FACTS}
    return {
        name: ", ".join(map(_without_folder, value)) if isinstance(value, list) else _without_folder(value)
        for name, value in facts.items()
        if value not in (None, "")
    }


def _without_folder(value: object) -> str:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(shown_sources(value))


def _display_name(named: ModelName) -> str:
    if named.kind == "folder":
        path = Path(named.name).resolve()
        # The student folders of all runs have the same name, so the name of the run is used.
        return path.parent.name if path.name == STUDENT_FOLDER else path.name
    has_tag = named.weights and not exists(named.weights)
    return named.name.removeprefix(HUB) + (f" ({named.weights})" if has_tag else "")


def _loading_error(named: ModelName, model_cfg: dict[str, Any], error: Exception) -> InputError | ConfigError:
    if isinstance(error, ConfigError):
        return error
    text_cfg = model_cfg.get("text_cfg", {})
    others = [text_cfg.get(key) for key in ("hf_model_name", "hf_tokenizer_name")] if named.kind != "folder" else []
    with_others = [str(name) for name in dict.fromkeys(others) if name] + ([named.weights] if named.weights else [])
    subject = f"The model {named.name}{' with ' if with_others else ''}{' and '.join(with_others)}"
    if isinstance(error, StrangeFileError) or "trust_remote_code" in str(error):
        return ConfigError(
            f"{subject} could not be loaded: {error if isinstance(error, StrangeFileError) else REMOTE_CODE}.",
            hint="use a model whose architecture transformers itself has",
        )
    if any(word in str(error) for word in ("connect", "resolve", "offline", "Max retries", "LocalEntryNotFound")):
        return InputError(
            f"{subject} could not be fetched: the hub cannot be reached, and its local cache is incomplete.",
            hint="download it on a machine with network access, and pass a folder with the model and its tokenizer as "
            "local-dir:PATH",
        )
    if named.kind == "hub":
        return InputError(
            f"{subject} could not be fetched: {first_line(error)}.", hint="check the name, or log in to the hub"
        )
    missing = f"pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
    if "Unknown model" in str(error):  # of timm
        missing = "if its image tower is your own, name the file that registers it: {modules} FILE"
    return ConfigError(f"{subject} could not be loaded: {first_line(error)}.", hint=missing)


def save_clip(
    folder: Path,
    clip: ClipModel,
    *,
    provenance: dict[str, Any],
    overwrite: bool = True,
) -> None:
    """Write a model atomically as an open_clip `local-dir:` folder, replacing an existing one.

    Args:
        provenance: recipe, teacher, data, seed, versions and metrics, written to distillation.json, which is published
            with the model: so without what may be a secret in the addresses of data.
        overwrite: if false, what is in use at `folder` once the model is written is kept.
    """
    require_utf8_path(folder)
    with new_folder(folder, overwrite=overwrite) as temporary:
        if clip.model_cfg["text_cfg"].get("hf_tokenizer_name"):  # open_clip then expects one in the folder
            clip.tokenizer.save_pretrained(temporary)  # type: ignore[attr-defined]
        save_open_clip(temporary, clip, location=folder)
        _write_record(temporary, clip, shown_sources(provenance))


def save_usage(folder: Path, clip: ClipModel) -> None:
    """Write distillation.json with a model's prompts and labels, and nothing of its training, into an existing folder.

    A model that has neither gets no such file.
    """
    if _Usage(clip.templates, clip.labels) != _Usage():
        _write_record(folder, clip, {})


def _write_record(folder: Path, clip: ClipModel, training: dict[str, Any]) -> None:
    record = {**training, "templates": list(clip.templates)}
    if clip.labels:
        record["labels"] = list(clip.labels)
    record_text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (folder / DISTILLATION_FILE).write_text(record_text, encoding="utf-8")


def save_open_clip(folder: Path, clip: ClipModel, *, location: Path) -> None:
    """Write a model's configuration and weights, as open_clip reads them, into an existing folder.

    Args:
        location: where the folder will be. open_clip finds the config.json of a text tower of transformers, which is
            written, too, by this path.
    """
    from safetensors.torch import save_file

    model_cfg = clip.model_cfg
    if clip.has_hugging_face_text:
        text: Any = clip.model.text
        # transformers may give the encoder of mT5 a configuration of its own, as 4.45 does, which open_clip would take
        # for that of a plain encoder.
        text_config = copy.deepcopy(text.transformer.config)
        text_config.is_encoder_decoder = text.config.is_encoder_decoder
        text_config.save_pretrained(folder)
        model_cfg = {**model_cfg, "text_cfg": {**model_cfg["text_cfg"], "hf_model_name": str(location.resolve())}}
    config = {"model_cfg": model_cfg, "preprocess_cfg": clip.preprocessing.open_clip_cfg()}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # It requires contiguous tensors that do not share memory.
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in clip.model.state_dict().items()}
    state = {name: tensor.contiguous(memory_format=torch.contiguous_format) for name, tensor in copies.items()}
    save_file(state, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    # safetensors makes it readable for its owner alone, whatever the umask.
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
