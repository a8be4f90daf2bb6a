"""Hugging Face's hub: asked only where it can be reached, and one sentence where it is needed and cannot."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from clip_rd_edge.contract.checkpoint import LOCAL_DIR
from clip_rd_edge.errors import ConfigError, InputError

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
