"""Embeddings of label sets on disk, by content: the next process with the same labels loads no text tower.

    CACHE/labels/KEY    SHA-256 of the rest, then the rows as .npy, (C, D) float32

KEY is a hash of all that the rows depend on, so that nothing ever goes stale. What is damaged is passed over and
written anew; what was not used for longest goes when the folder grows beyond MAX_BYTES.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.utils.io import cache_home, write_bytes

MAX_BYTES = 64_000_000
_DIGEST_BYTES = hashlib.sha256().digest_size


def label_cache_folder() -> Path:
    """Where the sets lie; it need not exist yet."""
    return cache_home() / "labels"


def label_set_key(text_tower: str, labels: Sequence[str], templates: Sequence[str]) -> str:
    """A name for a set of labels.

    Args:
        text_tower: what tells the text tower with its tokenizer from every other.
    """
    return hashlib.sha256(msgspec.json.encode((text_tower, list(labels), list(templates)))).hexdigest()


def read_label_set(key: str, *, count: int) -> Embeddings | None:
    """The rows of that name, (count, D), or None where there are none that are whole."""
    path = label_cache_folder() / key
    try:
        content = path.read_bytes()
        digest, rows = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(rows).digest() != digest:
            return None
        embeddings: Embeddings = np.load(io.BytesIO(rows), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if embeddings.ndim != 2 or len(embeddings) != count or embeddings.dtype != np.float32:
        return None
    with suppress(OSError):  # a cache that may only be read
        os.utime(path)
    return embeddings


def write_label_set(key: str, embeddings: Embeddings) -> None:
    """Keep rows, (C, D); in silence not, where the disk is full or the folder may not be written."""
    buffer = io.BytesIO()
    np.save(buffer, embeddings.astype(np.float32, copy=False))
    rows = buffer.getvalue()
    if len(rows) > MAX_BYTES:
        return
    with suppress(OSError):
        write_bytes(label_cache_folder() / key, hashlib.sha256(rows).digest() + rows)
        _shrink(label_cache_folder())


def _shrink(folder: Path) -> None:
    """Remove what was not used for longest until MAX_BYTES are left; another process may do so at the same time."""
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= MAX_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= size
