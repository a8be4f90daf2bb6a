"""An index of a picture folder: what was embedded, and the nearest of it to a text or a picture.

    index.json           folder, bundle, and for each picture its path, size, time and SHA-256
    embeddings-KEY.npy   theirs, (N, D) float32, row by row

index.json names its embeddings file and is written last, under a temporary name: whenever an indexing is interrupted,
the folder holds the index of some moment before.
"""

from __future__ import annotations

import hashlib
import io
import uuid
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from clip_rd_edge.contract.bundle import Manifest
from clip_rd_edge.contract.encoder import Embeddings, greatest
from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.utils.io import read_json, write_bytes

INDEX_VERSION = 1
_FILE = "index.json"


class Entry(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """A picture that was embedded; `path` is relative to the index's folder, with / between its parts."""

    path: str
    size_bytes: int
    modified_ns: int
    sha256: str


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """index.json.

    Attributes:
        folder: the pictures', absolute.
        bundle: the one that embedded them, absolute.
        model: `model_key` of that bundle.
        embeddings: name of the file with the rows, one an entry.
    """

    version: int
    folder: str
    bundle: str
    model: str
    embeddings: str
    entries: list[Entry]


class Hit(NamedTuple):
    """A picture and its cosine similarity to what was searched for."""

    path: Path
    similarity: float


def model_key(manifest: Manifest) -> str:
    """Changes when the same picture might get another embedding: with the image tower or the preprocessing."""
    tower = manifest.files.get(manifest.image.file, "")
    return hashlib.sha256(tower.encode() + msgspec.json.encode(manifest.preprocessing)).hexdigest()


def is_index(path: Path) -> bool:
    """Whether there is an index at `path`."""
    return (path / _FILE).is_file()


def read_index(path: Path) -> tuple[Index, Embeddings]:
    """An index and its rows, which are read from disk as they are used.

    Raises:
        InputError: there is no index.
        ConfigError: it is damaged, or of a newer format.
    """
    if not is_index(path):
        raise InputError(f"{path} is no index: it has no {_FILE}.", hint="make one with clip-rd-edge index")
    index = read_json(path / _FILE, Index)
    if index.version > INDEX_VERSION:
        raise ConfigError(f"{path / _FILE} has version {index.version}; this clip-rd-edge reads up to {INDEX_VERSION}.")
    try:
        rows = np.load(path / index.embeddings, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"The index {path} is damaged: {error}.", hint="remove it and index again") from error
    if rows.ndim != 2 or len(rows) != len(index.entries):
        raise ConfigError(f"The index {path} has {len(index.entries)} pictures for rows of shape {rows.shape}.")
    return index, rows


def write_index(path: Path, index: Index, rows: Embeddings) -> None:
    """Write an index in place of the one at `path`; what `index` says of its embeddings file is passed over."""
    old = set(path.glob("embeddings-*.npy"))
    buffer = io.BytesIO()
    np.save(buffer, rows.astype(np.float32, copy=False))
    name = f"embeddings-{uuid.uuid4().hex[:12]}.npy"
    write_bytes(path / name, buffer.getvalue())
    write_bytes(path / _FILE, msgspec.json.encode(msgspec.structs.replace(index, embeddings=name)))
    for file in old:
        with suppress(OSError):  # Windows keeps a file that somebody searches in: the next indexing removes it
            file.unlink()


def nearest(index: Index, rows: Embeddings, query: Embeddings, *, top: int) -> list[Hit]:
    """The pictures nearest to a query embedding, (D,) or (1, D), nearest first, the earlier of equals first.

    One product over all rows, exact, at the pace of the memory: for a hundred thousand pictures it takes less than
    opening their index, which names them all. A graph (usearch) answers faster once it is built, and building it takes
    longer than embedding: `python tests/runtime/benchmark_search.py 100000 --graph` measures both.
    """
    similarities = np.asarray(rows @ query.reshape(-1))
    best = greatest(similarities, top).tolist()
    return [Hit(Path(index.folder, index.entries[i].path), float(similarities[i])) for i in best]
