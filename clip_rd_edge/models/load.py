"""open_clip models from and to files: architectures, checkpoints, folders and the hub."""

from __future__ import annotations

import difflib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import msgspec
import torch
from torch import Tensor

from clip_rd_edge.contract.checkpoint import (
    CONFIG_FILE,
    DISTILLATION_FILE,
    LOCAL_DIR,
    STUDENT_FOLDER,
    WEIGHTS_FILE,
    model_folder,
)
from clip_rd_edge.contract.preprocess import Preprocessing
from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.utils.io import convert, new_folder


def load_clip(spec: str, *, pretrained: str | None = None) -> ClipModel:
    """Load a model with its own tokenizer and preprocessing, in evaluation mode, on the CPU.

    Args:
        spec: `ViT-B-32` or `open_clip:ViT-B-32` (an architecture of open_clip), `hf-hub:ORG/REPO`, `local-dir:PATH`,
            or the path of such a folder, or of a run's folder, whose student is meant.
        pretrained: for an architecture: one of open_clip's tags, or a checkpoint file.

    Raises:
        InputError: no such folder, file or architecture (with near matches), or the download failed.
        ConfigError: the configuration and the weights do not fit.
    """
    import open_clip

    spec = spec.removeprefix("open_clip:")
    folder = model_folder(spec)
    if folder is not None:
        spec = f"{LOCAL_DIR}{folder}"
        model_cfg = read_open_clip_config(folder)["model_cfg"]
    elif spec.startswith("hf-hub:"):
        model_cfg = {}
    else:
        model_cfg = _architecture(spec, pretrained)
    overrides = _relocated_text_cfg(folder, model_cfg) if folder else {}
    # Its own words come in the error that is raised: open_clip logs each step of loading, and each failure, too.
    logging.getLogger().setLevel(logging.CRITICAL)
    with hub_if_reachable() if asks_the_hub(spec, pretrained, model_cfg) else nullcontext():
        try:
            model = open_clip.create_model(
                spec, pretrained=pretrained, require_pretrained=True, pretrained_text=False, **overrides
            )
        except Exception as error:  # open_clip, hub and torch raise all kinds
            raise loading_error(with_parts(spec, pretrained, model_cfg), error) from error
        try:
            tokenizer = open_clip.get_tokenizer(spec)
            model_cfg = model_cfg or open_clip.get_model_config(spec)
        except Exception as error:
            named = model_cfg.get("text_cfg", {}).get("hf_tokenizer_name")
            what = f"The tokenizer of {spec}{f' ({named})' if named and not folder else ''}"
            raise loading_error(what, error) from error
    return ClipModel(
        name=_display_name(spec, pretrained),
        model=model.eval(),
        tokenizer=tokenizer,
        preprocessing=preprocessing_of(model),
        model_cfg=model_cfg,
        templates=_templates(folder),
    )


def read_open_clip_config(folder: Path) -> dict[str, Any]:
    """`open_clip_config.json` of a model's folder.

    Raises:
        InputError: no such folder, or it has no configuration.
        ConfigError: the configuration is no JSON object with `model_cfg`.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        reason = f"has no {CONFIG_FILE}" if folder.is_dir() else "does not exist"
        raise InputError(f"The model folder {folder} {reason}.", hint="give a folder that open_clip's local-dir: takes")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise ConfigError(f"{path} has no 'model_cfg'.")
    return config


def preprocessing_of(model: Any) -> Preprocessing:
    """What open_clip says of a model's pictures, as our struct."""
    raw = {k: v for k, v in model.visual.preprocess_cfg.items() if k in Preprocessing.__struct_fields__}
    size = raw["size"]
    raw["size"] = [size, size] if isinstance(size, int) else list(size)
    raw["mean"], raw["std"] = [float(x) for x in raw["mean"]], [float(x) for x in raw["std"]]
    return convert(raw, Preprocessing, source="the model's preprocess_cfg")


def _architecture(name: str, pretrained: str | None) -> dict[str, Any]:
    import open_clip

    config: dict[str, Any] | None = open_clip.get_model_config(name)
    if config is None:
        known = open_clip.list_models()
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "open_clip.list_models() lists them"
        raise InputError(
            f"There is no model {name!r}: neither a folder nor one of open_clip's architectures.", hint=hint
        )
    if pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise InputError(
            f"The architecture {name} was named without weights.",
            hint=f"add --pretrained with a checkpoint file or a tag: {', '.join(tags) or 'open_clip has none for it'}",
        )
    return config


def _relocated_text_cfg(folder: Path, model_cfg: dict[str, Any]) -> dict[str, Any]:
    """Where a Hugging Face text tower's config.json lies in the model's own folder, take it from there.

    open_clip resolves `hf_model_name` as a hub name or absolute path only, so that a folder that was moved would ask
    the network for what lies in it.
    """
    text_cfg = model_cfg.get("text_cfg", {})
    if "hf_model_name" not in text_cfg or not (folder / "config.json").is_file():
        return {}
    return {"text_cfg": {**text_cfg, "hf_model_name": str(folder.resolve()), "hf_model_pretrained": False}}


def _templates(folder: Path | None) -> tuple[str, ...]:
    path = folder / DISTILLATION_FILE if folder else None
    if path is None or not path.is_file():
        return ("{}",)
    return msgspec.json.decode(path.read_bytes(), type=_Templates).templates


class _Templates(msgspec.Struct):
    templates: tuple[str, ...] = ("{}",)


def _display_name(spec: str, pretrained: str | None) -> str:
    if spec.startswith(LOCAL_DIR):
        path = Path(spec.removeprefix(LOCAL_DIR)).resolve()
        # Every run keeps its student in a folder of the same name: the run's name tells more.
        return path.parent.name if path.name == STUDENT_FOLDER else path.name
    return spec.removeprefix("hf-hub:") + (f" ({pretrained})" if pretrained and not Path(pretrained).exists() else "")


_PORTS = {"http": 80, "https": 443}


@contextmanager
def hub_if_reachable() -> Iterator[None]:
    """Within, only the hub's cache serves where the name of its host cannot be resolved.

    The hub's own client tries each of a model's files six times and waits between, minutes in all.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _resolves(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def asks_the_hub(spec: str, pretrained: str | None, model_cfg: dict[str, Any]) -> bool:
    """Whether anything but local files may be needed."""
    parts = any(key.startswith("hf_") for key in model_cfg.get("text_cfg", {}))
    tag = pretrained is not None and not Path(pretrained).exists()
    return tag or spec.startswith("hf-hub:") or (parts and not spec.startswith(LOCAL_DIR))


def with_parts(spec: str, pretrained: str | None, model_cfg: dict[str, Any]) -> str:
    """The model in words, with all that open_clip fetches to build it."""
    text_model = model_cfg.get("text_cfg", {}).get("hf_model_name")
    text = f" with the text tower {text_model}" if text_model and not spec.startswith(LOCAL_DIR) else ""
    weights = f"{' and' if text else ' with'} the weights {pretrained!r}" if pretrained else ""
    return f"The model {spec}{text}{weights}"


def loading_error(what: str, error: Exception) -> InputError | ConfigError:
    """What failed to load, as an error that says what is missing; `error` is any that open_clip or the hub raised."""
    if _needs_network(error):
        return InputError(
            f"{what} could not be fetched: the hub cannot be reached, and its cache here has not all of it.",
            hint="fetch it where there is a network, and give a folder with the model and its tokenizer as "
            "local-dir:PATH",
        )
    first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "hf-hub:" in what:
        return InputError(f"{what} could not be fetched: {first_line}.", hint="check the name, or log in to the hub")
    return ConfigError(f"{what} could not be loaded: {first_line}.")


def _resolves(url: str) -> bool:
    parts = urlsplit(url)
    # A proxy resolves names itself.
    if parts.scheme in getproxies() or "ALL_PROXY" in os.environ or "all_proxy" in os.environ:
        return True
    try:
        socket.getaddrinfo(parts.hostname, parts.port or _PORTS.get(parts.scheme, 443))
    except OSError:
        return False
    return True


def _needs_network(error: BaseException) -> bool:
    """Whether a failure to load, by its words, comes of a hub that is out of reach and a cache that has not all."""
    words = ("connect", "resolve", "offline", "Max retries", "LocalEntryNotFound")
    return any(word in str(error) for word in words)


def save_clip(
    folder: Path, clip: ClipModel, *, provenance: dict[str, Any], extras: Callable[[Path], None] | None = None
) -> None:
    """Write a model as an open_clip local-dir, whole or not at all, replacing what stood there.

    Args:
        provenance: recipe, teacher, data, seed, versions, metrics: written as distillation.json.
        extras: writes what else belongs in the folder, such as plots.
    """
    from safetensors.torch import save_file

    state = {name: _plain(tensor) for name, tensor in clip.model.state_dict().items()}
    with new_folder(folder) as temporary:
        model_cfg = dict(clip.model_cfg)
        if _is_hugging_face(clip):
            model_cfg["text_cfg"] = {**model_cfg["text_cfg"], "hf_model_name": str(folder.resolve())}
            clip.model.text.transformer.config.save_pretrained(temporary)  # type: ignore[union-attr, operator]
            clip.tokenizer.save_pretrained(temporary)  # type: ignore[attr-defined]
        config = {"model_cfg": model_cfg, "preprocess_cfg": _preprocess_cfg(clip)}
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_file(state, str(temporary / WEIGHTS_FILE), metadata={"format": "pt"})
        record = {**provenance, "templates": list(clip.templates)}
        (temporary / DISTILLATION_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        if extras is not None:
            extras(temporary)


def _plain(tensor: Tensor) -> Tensor:
    # safetensors stores plain contiguous tensors that share no memory.
    return tensor.detach().to("cpu", copy=True).contiguous(memory_format=torch.contiguous_format)


def _is_hugging_face(clip: ClipModel) -> bool:
    return "hf_model_name" in clip.model_cfg.get("text_cfg", {})


def _preprocess_cfg(clip: ClipModel) -> dict[str, Any]:
    how = clip.preprocessing
    return {
        "size": list(how.size),
        "mode": "RGB",
        "mean": list(how.mean),
        "std": list(how.std),
        "interpolation": how.interpolation,
        "resize_mode": how.resize_mode,
        "fill_color": how.fill_color,
    }
