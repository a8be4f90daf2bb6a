"""Label banks, made by the bundle's own text tower."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from clip_rd_edge.contract.bundle import Manifest
from clip_rd_edge.contract.encoder import Embeddings, label_embeddings
from clip_rd_edge.contract.label_bank import LabelBank, LabelPrecision, write_labels
from clip_rd_edge.errors import InputError
from clip_rd_edge.runtime.load import encoder_of
from clip_rd_edge.utils.io import cache_home, write_bytes


def write_label_bank(folder: Path, manifest: Manifest, labels: Sequence[str]) -> None:
    """Embed each label once by the bundle's own text tower and prompts, and write labels.npz; the manifest comes after.

    They are stored in the precision of the tower that made them: INT8 costs them less than it cost the tower.

    Raises:
        InputError: no labels, or an empty one.
    """
    names = tuple(dict.fromkeys(labels))
    embeddings = label_embeddings(encoder_of(folder, manifest, device="cpu"), names, manifest.templates)
    tower = manifest.text.precision
    precision: LabelPrecision = "fp32" if tower == "fp32" else "int8" if tower.startswith("int8") else "fp16"
    write_labels(folder, LabelBank(names, embeddings), precision=precision)


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


def read_label_list(labels: Sequence[str]) -> list[str] | None:
    """Labels, or what the file holds whose path is the only one; None where there are none.

    Raises:
        InputError: as `read_labels_file`.
    """
    if len(labels) == 1 and Path(labels[0]).is_file():
        return read_labels_file(Path(labels[0]))
    return list(labels) or None


def read_labels_file(path: Path) -> list[str]:
    """Labels, one a line; empty lines are passed over.

    Raises:
        InputError: no such file, not UTF-8, or no label in it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"Cannot read the labels {path}: {error.strerror or error}.", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The labels {path} are not UTF-8 text: {error.reason} at byte {error.start}.") from error
    labels = [line.strip() for line in lines if line.strip()]
    if not labels:
        raise InputError(f"{path} has no labels; expected one a line.")
    return labels
