"""Limits on what a model's configuration may ask for: otherwise a file of 200 bytes could take all memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip_rd_edge.errors import ConfigError

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
    for name in ("vision_cfg", "text_cfg"):
        tower = model_cfg.get(name, {})
        if not isinstance(tower, dict):
            raise ConfigError(f"{path} has a {name!r} that is no object.")
        layers, width = (value if isinstance(value := tower.get(key), int) else 0 for key in ("layers", "width"))
        if layers > _MAX_LAYERS or layers * width**2 * _PARAMETERS_PER_WIDTH > _MAX_BLOCK_PARAMETERS:
            raise ConfigError(f"{path} has {layers:,} layers of width {width:,} in {name!r}; no such model exists.")
    for key, number in _numbers(model_cfg):
        if abs(number) > _MAX_NUMBER:
            raise ConfigError(f"{path} has {key} = {number:,}; expected at most {_MAX_NUMBER:,}.")


def _numbers(content: Any, key: str = "model_cfg") -> Iterator[tuple[str, int]]:
    """Yield the integers in nested objects and lists, with their keys."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _numbers(value, name)
    elif isinstance(content, list):
        for value in content:
            yield from _numbers(value, key)
    elif isinstance(content, int):
        yield key, content
