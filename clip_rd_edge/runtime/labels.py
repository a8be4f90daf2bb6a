"""Embeddings of labels: a bundle's label bank and the user's label cache."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings, Encoder, label_embeddings
from clip_rd_edge.bundle.labels import MAX_BYTES as BANK_BYTES
from clip_rd_edge.bundle.labels import LabelBank, LabelPrecision, require_readable, write_labels
from clip_rd_edge.bundle.manifest import Manifest
from clip_rd_edge.runtime.load import open_bundle
from clip_rd_edge.utils.arrays import load_array, npy_bytes
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.paths import cache_home


def write_label_bank(
    folder: Path, manifest: Manifest, labels: Sequence[str], *, encoder: Encoder | None = None
) -> None:
    """Embed labels with the bundle's own text tower and templates, and write labels.npz.

    Call this before the manifest is written, which has the file's checksum. Embeddings are stored in the precision of
    the text tower: storing them in INT8 loses less accuracy than the INT8 tower already has. Without a text tower, they
    are stored in float16, or in float32 beside an image tower in float32.

    Args:
        folder, manifest: the bundle.
        labels: the names, in order.
        encoder: embeds them in the bundle's place, if that does not run here or has no text tower.
    """
    names = tuple(dict.fromkeys(labels))
    if encoder is None:
        own = open_bundle(folder, manifest, device="cpu")
        own.require_right(manifest.require_text())
        encoder = own
    tower = (manifest.text or manifest.image).precision
    int8 = manifest.text is not None and tower.startswith("int8")
    precision: LabelPrecision = "fp32" if tower == "fp32" else "int8" if int8 else "fp16"
    require_readable(names, manifest.embedding_size, precision)
    embeddings = label_embeddings(encoder, names, manifest.templates)
    write_labels(folder, LabelBank(names, embeddings), precision=precision)


MAX_BYTES = BANK_BYTES + 1024  # of the label cache: as many labels as a bundle may have, and what is beside the rows
_DIGEST_BYTES = hashlib.sha256().digest_size


def label_cache_folder() -> Path:
    """Return the folder of the label cache, which may not exist yet."""
    return cache_home() / "labels"


def label_set_key(text_tower: str, labels: Sequence[str], templates: Sequence[str]) -> str:
    """Return the cache key of a list of labels.

    Args:
        text_tower: identifies the text tower and its tokenizer (`BundleEncoder.text_key`).
        labels, templates: the labels in order, and the prompt templates.
    """
    return hashlib.sha256(msgspec.json.encode((text_tower, list(labels), list(templates)))).hexdigest()


def read_label_set(key: str, *, count: int) -> Embeddings | None:
    """Return the cached embeddings, (count, D), or None if there are none or they are damaged."""
    path = label_cache_folder() / key
    try:
        content = path.read_bytes()
        digest, rows = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(rows).digest() != digest:
            return None
        embeddings: Embeddings = load_array(io.BytesIO(rows))
    except (OSError, ValueError, EOFError):
        return None
    if embeddings.ndim != 2 or len(embeddings) != count or embeddings.dtype != np.float32:
        return None
    with suppress(OSError):  # a read-only cache
        os.utime(path)
    return embeddings


def write_label_set(key: str, embeddings: Embeddings) -> None:
    """Cache embeddings, (C, D); silently do nothing if they are too large or cannot be written."""
    rows = npy_bytes(embeddings.astype(np.float32, copy=False))
    if _DIGEST_BYTES + len(rows) > MAX_BYTES:
        return
    with suppress(OSError):
        write_bytes(label_cache_folder() / key, hashlib.sha256(rows).digest() + rows)
        _shrink(label_cache_folder())


def _shrink(folder: Path) -> None:
    """Delete the least recently used files beyond MAX_BYTES; another process may do so at the same time."""
    files = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            stat = path.stat()
            files.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= MAX_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= size
