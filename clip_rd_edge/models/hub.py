"""Downloads of models: from the hub, where it can be reached."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from clip_rd_edge.errors import InputError, first_line
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
