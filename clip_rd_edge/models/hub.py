"""Models of others: downloads from the hub, and what a model's own files may name.

That is architectures, and what lies beside the files, but no path, no code and no other model. The configurations that
come with open_clip may name more, and so may what the user typed.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from clip_rd_edge.bundle.runs import TRANSFORMERS_CONFIG
from clip_rd_edge.errors import ConfigError, InputError, first_line, quoted
from clip_rd_edge.utils.paths import is_file
from clip_rd_edge.utils.process import SharedBlock

_PORTS = {"http": 80, "https": 443}


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Within the block, use only the hub's local cache if its host name cannot be resolved.

    The hub client would retry each file of a model six times with waits in between, which takes minutes.
    """
    from huggingface_hub import constants

    previous = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = previous or not _resolves(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = previous


HUB_IF_REACHABLE = SharedBlock(_offline_if_unreachable)


def _resolves(url: str) -> bool:
    parts = urlsplit(url)
    # A proxy resolves host names itself.
    if parts.scheme in getproxies() or "ALL_PROXY" in os.environ or "all_proxy" in os.environ:
        return True
    try:
        socket.getaddrinfo(parts.hostname, parts.port or _PORTS.get(parts.scheme, 443))
    except OSError:
        return False
    return True


@contextmanager
def fetching(what: str, *, option: str = "pretrained") -> Iterator[None]:
    """Within the block, an error is that of a download; `option` takes a file in its place."""
    try:
        with HUB_IF_REACHABLE:
            yield
    except Exception as error:  # timm, the hub client, urllib and torch raise many types
        raise InputError(
            f"{what} could not be fetched: {first_line(error)}.",
            hint=f"download them on a machine with network access, and pass the file: {{{option}}} FILE",
        ) from error


_TIMM_NAME = re.compile(r"[\w.]+")  # of an architecture, with its tag or without: timm also takes a path, and the hub's
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TOKENIZER_TEXTS = ("clean", "language")  # in `tokenizer_kwargs`; other texts, such as bpe_path or subfolder, are paths
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")  # with a /, code from the hub
_NO_VOCABULARY = ("tokenizer_config_file", "special_tokens_map_file", "added_tokens_file")


def refuse_other_places(model_cfg: dict[str, Any], source: str, *, folder: Path | None = None) -> None:
    """Refuse a configuration that leads to anything but the model's own files.

    open_clip fetches the config.json of `hf_model_name` from the hub, or reads it at a path. For a model in a folder,
    it is fetched only if the folder lacks it and open_clip's own configurations name the text model.

    Args:
        model_cfg: of `open_clip_config.json`, whose towers are objects.
        source: what to call it in the message.
        folder: the model's; None for a model of the hub, which may name others there.
    """
    for key, value, hint in _other_places(model_cfg.get("vision_cfg", {}), model_cfg.get("text_cfg", {}), folder):
        raise ConfigError(f"{source} leads to other files than the model's own: {key} is {quoted(value)}.", hint=hint)


def _other_places(
    vision_cfg: dict[str, Any], text_cfg: dict[str, Any], folder: Path | None
) -> Iterator[tuple[str, object, str]]:
    """Yield each key of a configuration that leads elsewhere, with its value and what to do."""
    named = [("timm_model_name", vision_cfg.get("timm_model_name"), _TIMM_NAME)]
    if folder is None:
        named += [(key, text_cfg.get(key), _HUB_NAME) for key in ("hf_model_name", "hf_tokenizer_name")]
    for key, name, pattern in named:
        if name and not pattern.fullmatch(str(name)):
            yield key, name, "use a model whose towers are named by their architecture"
    name = text_cfg.get("hf_model_name")
    if name and folder and not is_file(folder / TRANSFORMERS_CONFIG) and str(name) not in _published_text_models():
        hint = f"put that text model's {TRANSFORMERS_CONFIG} there, or name a model of the hub: hf-hub:ORG/REPO"
        yield "hf_model_name", name, hint
    options = text_cfg.get("tokenizer_kwargs") or {}
    for key, value in options.items() if isinstance(options, dict) else [("tokenizer_kwargs", options)]:
        if not (isinstance(value, int | float | None) or (key in _TOKENIZER_TEXTS and isinstance(value, str))):
            yield key, value, "leave it out: the files of a tokenizer lie beside the configuration"


@cache
def _published_text_models() -> frozenset[str]:
    import open_clip

    configs = map(open_clip.get_model_config, open_clip.list_models())
    return frozenset(name for config in configs if (name := config["text_cfg"].get("hf_model_name")))


class StrangeFileError(Exception):
    """A file of a model names code or a path; the message names it, as the end of a sentence."""


REMOTE_CODE = "it needs Python code that came with it (auto_map), which is never run"


@contextmanager
def _without_strangers() -> Iterator[None]:
    """Within the block, transformers follows nothing that a model's files name: Python code, vocabularies, kernels.

    open_clip does not pass `trust_remote_code`, and a model's own `tokenizer_kwargs` can set it. All such code is
    imported by one function of transformers, and without it, it does not ask whether it may. Before 5.2x, it opened
    whatever tokenizer_config.json names as the file of a vocabulary.
    """
    from transformers import PretrainedConfig, PreTrainedTokenizerBase
    from transformers import dynamic_module_utils as modules

    # As they are defined, and not bound to these classes, of which others inherit them.
    read_config = vars(PretrainedConfig)["_dict_from_json_file"]
    open_tokenizer = vars(PreTrainedTokenizerBase)["_from_pretrained"]

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise StrangeFileError(REMOTE_CODE)

    def read_own_config(cls: Any, path: Any) -> Any:
        content = read_config.__func__(cls, path)
        for key in _KERNELS:
            if "/" in str(content.get(key)):
                raise StrangeFileError(f"its {key} is {quoted(content[key])}, code of the hub, which is never run")
        return content

    def open_own_tokenizer(cls: Any, files: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        if path := files.get("tokenizer_config_file"):
            content = json.loads(Path(path).read_bytes())
            for key in sorted(files.keys() - _NO_VOCABULARY):
                if isinstance(content.get(key), str):
                    raise StrangeFileError(f"its tokenizer_config.json names a {key}, {quoted(content[key])}")
        return open_tokenizer.__func__(cls, files, *arguments, **options)

    previous = modules.get_class_in_module, modules.TIME_OUT_REMOTE_CODE
    modules.get_class_in_module, modules.TIME_OUT_REMOTE_CODE = refuse, 0  # seconds to wait for an answer on stdin
    PretrainedConfig._dict_from_json_file = classmethod(read_own_config)
    PreTrainedTokenizerBase._from_pretrained = classmethod(open_own_tokenizer)
    try:
        yield
    finally:
        modules.get_class_in_module, modules.TIME_OUT_REMOTE_CODE = previous
        PretrainedConfig._dict_from_json_file = read_config
        PreTrainedTokenizerBase._from_pretrained = open_tokenizer


# The first thread that has loaded its model must not let a stranger's code into that of another one.
NO_STRANGERS = SharedBlock(_without_strangers)


_MAX_NUMBER = 10_000_000  # larger than any vocabulary, width or size
_MAX_LAYERS = 1_000
_MAX_BLOCK_PARAMETERS = 20_000_000_000  # of the blocks of a tower: ten times the largest in open_clip
_PARAMETERS_PER_WIDTH = 12  # of a transformer block, times its width squared


def require_bounded(model_cfg: dict[str, Any], path: Path | str) -> None:
    """Raise ConfigError if a tower's settings are not an object, or a number in them is absurd.

    Args:
        model_cfg: of `open_clip_config.json`.
        path: of that file, or the name of a model of the hub, for the message.
    """
    wrong = [f"{key} = {number:,}" for key, number in _numbers(model_cfg) if abs(number) > _MAX_NUMBER]
    for name in ("vision_cfg", "text_cfg"):
        tower = model_cfg.get(name, {})
        if not isinstance(tower, dict):
            wrong.insert(0, f"a {name!r} that is not an object")
            break
        layers, width = (value if isinstance(value := tower.get(key), int) else 0 for key in ("layers", "width"))
        if layers > _MAX_LAYERS or layers * width**2 * _PARAMETERS_PER_WIDTH > _MAX_BLOCK_PARAMETERS:
            wrong.append(f"{layers:,} layers of width {width:,} in {name!r}")
    if wrong:
        raise ConfigError(f"{path} has {wrong[0]}; no such model exists.")


def _numbers(content: Any, key: str = "model_cfg") -> Iterator[tuple[str, int]]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _numbers(value, name)
    elif isinstance(content, list):
        for value in content:
            yield from _numbers(value, key)
    elif isinstance(content, int):
        yield key, content
