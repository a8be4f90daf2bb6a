"""Where what was made once and is needed again lies: drawn pictures, indices of shards."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """$CLIP_RD_EDGE_CACHE, else `clip-rd-edge` in the user's cache folder; it need not exist yet."""
    base = os.environ.get("CLIP_RD_EDGE_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "clip-rd-edge"
