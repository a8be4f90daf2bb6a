"""An index of an image folder, to search by text or image.

    index.json           image folder, bundle, and per image its path, size, times and SHA-256; and its own CRC-32
    embeddings-KEY.npy   the images' embeddings, (N, D) float32, one row per entry; index.json has a CRC-32 per block
    keys-KEY.npy         from a million images on: a key per row, the same for copies of an image
    graph-KEY.usearch    for approximate search: see `runtime.search_graph`

index.json names its embeddings file and is written last and atomically: if indexing is interrupted, the folder still
holds a valid, older index. Writers wait for each other (`exclusive_writer`). Readers take no lock, so that a folder
that they cannot write to can be searched: if the embeddings that index.json named are gone, they read it again. Blocks
of rows are checked when they are read. A search refuses those that have changed on the disk, and an update embeds their
images again.
"""

from __future__ import annotations

import hashlib
import io
import os
import uuid
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import msgspec
import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings, require_cosines, top_indices
from clip_rd_edge.bundle.image_files import IMAGE_SUFFIXES
from clip_rd_edge.bundle.images import ImageInput, as_rgb
from clip_rd_edge.bundle.manifest import Manifest, is_bundle
from clip_rd_edge.errors import ConfigError, InputError, quoted
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.search_graph import (
    MAX_TOP,
    Graph,
    GraphFile,
    Rows,
    keys_of,
    restore_graph,
    usearch_is_installed,
)
from clip_rd_edge.utils.arrays import load_array, npy_bytes
from clip_rd_edge.utils.files import is_plain_name, read_text_limited, write_bytes, write_text
from clip_rd_edge.utils.paths import cache_home, expand_home, is_file, looks_like_path, near_files
from clip_rd_edge.utils.structs import read_versioned_json

INDEX_VERSION = 1
INDEX_FILE, _ROWS, _KEYS = "index.json", "embeddings-", "keys-"
_FOLDER = "folder"  # among what is remembered, beside the keys of models
_MAKE_ANEW = "delete it and index the folder again"
_BLOCK_ROWS = 64  # per checksum: an approximate search reads about 128 rows, of as many blocks
GRAPH_FROM = 1_000_000  # images: below, comparing all rows takes less than 60 ms


Stamp = tuple[int, int, int]  # size in bytes, and times of modification and change in nanoseconds


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An indexed image; `path` is relative to the image folder, with / as separator.

    Attributes:
        changed_ns: the time of the last change (on Windows, of the creation), which no tool puts back.
    """

    path: str
    size_bytes: int
    modified_ns: int
    changed_ns: int
    sha256: str

    @property
    def stamp(self) -> Stamp:
        return self.size_bytes, self.modified_ns, self.changed_ns


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """The content of index.json.

    Attributes:
        folder: absolute path of the image folder.
        bundle: absolute path of the bundle that embedded the images.
        model: `model_key` of that bundle.
        embeddings: name of the embeddings file, which has one row per entry.
        crc32s: of its blocks of _BLOCK_ROWS rows.
        graph: for approximate search; None if search is exact.
        missing: number of images that were still to be embedded when it was saved.
        cutoff: cosine below which an image does not fit a text: see `index_update.text_cutoff`; None if unknown.
    """

    folder: str
    bundle: str
    model: str
    embeddings: str
    entries: list[Entry]
    crc32s: list[int] = []
    graph: GraphFile | None = None
    missing: int = 0
    cutoff: float | None = None


class _File(msgspec.Struct, frozen=True):
    """index.json: an Index as text, and the CRC-32 of that."""

    version: int
    crc32: int
    index: msgspec.Raw


class Hit(NamedTuple):
    """An image and its cosine similarity to the query."""

    path: Path
    similarity: float


class Hits(list[Hit]):
    """The images nearest to a query, nearest first.

    Attributes:
        indexed: number of images in the index.
        missing: number of images that are not in it yet, because indexing was interrupted or is still running.
        cutoff: cosine below which images fit a text no better than the best fit random texts; None if unknown, or for
            an image.
    """

    indexed: int = 0
    missing: int = 0
    cutoff: float | None = None


def model_key(manifest: Manifest) -> str:
    """Return a key of the model that embeds images: of the image tower, its precision, and the preprocessing.

    It covers neither runtime nor device: the same bundle gives nearly the same embeddings everywhere, within the limits
    of `verify`, so an index that one machine made is searched, and updated, on another.
    """
    tower = "".join(manifest.files.get(name, "") for name in manifest.files_of(manifest.image))
    # Only a bundle in bfloat16 computes in another precision than its file says, which is that of the float32 bundle.
    precision = "bf16" if manifest.image.precision.startswith("bf16") else ""
    return hashlib.sha256(tower.encode() + precision.encode() + msgspec.json.encode(manifest.preprocessing)).hexdigest()


def is_index(path: Path) -> bool:
    """Return whether `path` is the folder of an index."""
    return is_file(path / INDEX_FILE)


def read_index(path: Path, *, memory_mapped: bool = True) -> tuple[Index, Embeddings]:
    """Read an index and its embeddings.

    Args:
        memory_mapped: whether the embeddings stay in their file, and are checked when they are compared. If the file is
            cut, or disappears from a network share, the process ends with SIGBUS, which a long-running one cannot risk.
    """
    if not is_index(path):
        raise InputError(f"{path} is not an index: it has no {INDEX_FILE}.", hint="create one with clip-rd-edge index")
    index = _read(path)
    while True:
        try:
            rows = load_array(path / index.embeddings, memory_mapped=memory_mapped)
            break
        except (OSError, ValueError, EOFError) as error:
            missing, index = index, _read(path)  # a writer may have replaced both files since it was read
            if not isinstance(error, FileNotFoundError) or index.embeddings == missing.embeddings:
                raise ConfigError(f"The index {path} is damaged: {error}.", hint=_MAKE_ANEW) from error
    is_matrix = rows.ndim == 2 and rows.dtype == np.float32 and rows.flags.c_contiguous
    if not is_matrix or len(rows) != len(index.entries) or len(index.crc32s) != len(_blocks(rows)):
        raise ConfigError(f"The index {path} is damaged: its embeddings do not fit its images.", hint=_MAKE_ANEW)
    if not memory_mapped:
        _require_intact(index, rows)
    return index, rows


def _read(path: Path) -> Index:
    file = read_versioned_json(path / INDEX_FILE, _File, newest=INDEX_VERSION, key="version", hint=_MAKE_ANEW)
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        index = msgspec.json.decode(file.index, type=Index)
        names = (index.embeddings, *([index.graph.name] if index.graph else ()))
        is_inside = all(map(is_plain_name, names)) and not any(_is_elsewhere(entry.path) for entry in index.entries)
        if zlib.crc32(file.index) == file.crc32 and is_inside:
            return index
    raise ConfigError(f"The index {path} is damaged: {INDEX_FILE} has changed since it was written.", hint=_MAKE_ANEW)


def _is_elsewhere(name: str) -> bool:
    """Return whether the path of an image leads out of the image folder."""
    if name and ".." not in name and name[0] not in "/\\" and ":" not in name:
        return False  # of nearly all images, in little time
    path = PurePath(name)
    return not name or ".." in path.parts or bool(path.anchor)


def write_index(path: Path, index: Index, rows: Embeddings) -> Index:
    """Write an index, replacing the one at `path`; return it with the new name of its embeddings file.

    Call this with the folder locked: it deletes what older writers have left.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    header = io.BytesIO()  # of the .npy file; the rows of a large index are not copied
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(rows))
    index = msgspec.structs.replace(
        index,
        embeddings=f"{_ROWS}{uuid.uuid4().hex[:12]}.npy",
        crc32s=[_crc32(rows, block) for block in _blocks(rows)],
        graph=index.graph if len(rows) >= GRAPH_FROM else None,
    )
    write_bytes(path / index.embeddings, header.getvalue(), rows.data)
    if index.graph:
        write_bytes(keys_file(path, index), npy_bytes(keys_of(rows)))
    write_content(path, index)
    return index


def write_content(path: Path, index: Index) -> None:
    """Write index.json, whose other files are there, and delete those of earlier ones."""
    content = msgspec.json.encode(index)
    head = b'{"version":%d,"crc32":%d,"index":' % (INDEX_VERSION, zlib.crc32(content))
    write_bytes(path / INDEX_FILE, head, content, b"}")
    own = {path / index.embeddings, *({keys_file(path, index), path / index.graph.name} if index.graph else ())}
    for file in leftovers(path) - own:
        with suppress(OSError):  # on Windows, one that another process has open; the next update deletes it
            file.unlink()


def leftovers(path: Path) -> set[Path]:
    """Return the files of a writer other than index.json: also what a kill left half written."""
    names = (f"{_ROWS}*", f"{_KEYS}*", "graph-*")
    patterns = (*names, *(f".{name}.tmp" for name in names), f".{INDEX_FILE}.*.tmp")
    return {file for pattern in patterns for file in path.glob(pattern)}


def keys_file(path: Path, index: Index) -> Path:
    """Return the file with a key for each row of an index with a graph."""
    return path / index.embeddings.replace(_ROWS, _KEYS)


def _blocks(rows: Embeddings) -> range:
    return range(-(-len(rows) // _BLOCK_ROWS))


def _crc32(rows: Embeddings, block: int) -> int:
    return zlib.crc32(rows[block * _BLOCK_ROWS : (block + 1) * _BLOCK_ROWS].data)


def _damaged(index: Index, rows: Embeddings, blocks: Iterable[int]) -> list[int]:
    plain = np.asarray(rows)  # each slice of a mapped file would be one, too
    return [block for block in blocks if _crc32(plain, block) != index.crc32s[block]]


def without_damage(index: Index, rows: Embeddings) -> tuple[Index, Embeddings]:
    """Return an index, and its rows, without the blocks of rows that have changed since they were written."""
    if not (damaged := _damaged(index, rows, _blocks(rows))):
        return index, rows
    kept = np.flatnonzero(~np.isin(np.arange(len(rows)) // _BLOCK_ROWS, damaged))
    return msgspec.structs.replace(index, entries=[index.entries[row] for row in kept.tolist()]), rows[kept]


def _require_intact(index: Index, rows: Embeddings, chosen: Rows | None = None) -> None:
    """Raise ConfigError if rows, all or the chosen ones, have changed since they were written."""
    blocks = _blocks(rows) if chosen is None else np.unique(chosen // _BLOCK_ROWS).tolist()
    if damaged := _damaged(index, rows, blocks):
        raise ConfigError(
            f"The index of {index.folder} is damaged: {len(damaged):,} of its blocks of {_BLOCK_ROWS} embeddings have "
            f"changed on the disk; the first holds that of {index.entries[damaged[0] * _BLOCK_ROWS].path}.",
            hint="index the folder again, which embeds these images again",
        )


def nearest(index: Index, rows: Embeddings, query: Embeddings, **options: Any) -> list[Hit]:
    """Return the images nearest to a query, as `nearest_rows` finds them."""
    found = nearest_rows(index, rows, query, **options)
    return [Hit(Path(index.folder, index.entries[row].path), cosine) for row, cosine in found]


def nearest_rows(
    index: Index, rows: Embeddings, query: Embeddings, *, top: int, graph: Graph | None = None, checked: bool = True
) -> list[tuple[int, float]]:
    """Return the rows nearest to a query embedding, (D,) or (1, D), nearest first, with their cosine similarities.

    Ties keep the index's order. Without a graph, or for more than MAX_TOP results, the search is exact: one matrix
    product over all rows, limited by memory bandwidth. For 100,000 images it takes less time than reading index.json.
    With a graph, only the rows that it proposes are compared, if it proposes enough: `python -m
    benchmarks.devices.search 100000 --graph` measures both.

    Args:
        checked: whether the rows are known to be intact; else those that are compared are checked now.
    """
    query = query.reshape(-1)
    candidates = graph.candidates(query, top) if graph is not None and top <= MAX_TOP else None
    compared = np.arange(len(rows)) if candidates is None else np.sort(candidates)
    if not checked:
        _require_intact(index, rows, compared)
    cosines = (rows if candidates is None else rows[compared]) @ query
    best = top_indices(require_cosines(cosines, "An image of the index, or the query,"), top)
    return [(int(compared[i]), float(cosines[i])) for i in best.tolist()]


def search_index(
    path: Path,
    query: ImageInput,
    *,
    top: int = 10,
    bundle: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    exact: bool = False,
    **options: Any,
) -> Hits:
    """Search the index at `path` for the images nearest to a query; nearest first.

    Args:
        query: a text or an image; a string that is the path of a file is opened as an image.
        top: number of images to return.
        bundle: path of the bundle that created the index; None is the one that this user named for it last.
        folder: current path of the image folder; None uses the path in the index.
        exact: compare all images, even if the index has a graph.
        options: of `runtime.load.load`, which opens the bundle.
    """
    asked = _text_or_image(query) if isinstance(query, str) else query
    index, rows = read_index(path)
    if folder is not None:
        index = msgspec.structs.replace(index, folder=os.fspath(folder))
    encoder = load(bundle or _remembered_bundle(path, index), **options)
    require_same_model(encoder, index, path)
    remember(path, encoder, folder)
    embedding = encoder.encode_texts([asked]) if isinstance(asked, str) else encoder.encode_images([as_rgb(asked)])
    graph = None if exact else open_graph(path, index)
    hits = Hits(nearest(index, rows, embedding, top=top, graph=graph, checked=False))
    hits.indexed, hits.missing = len(index.entries), index.missing
    hits.cutoff = index.cutoff if isinstance(asked, str) else None
    return hits


def remember(path: Path, encoder: BundleEncoder, folder: str | os.PathLike[str] | None) -> None:
    """Remember in the user's cache the bundle, and the image folder, that were named for the index at `path`."""
    with suppress(OSError, UnicodeError):  # a full or read-only cache: the bundle is then to be named again
        write_text(_memory_of(path, model_key(encoder.manifest)), os.fspath(encoder.folder.resolve()))
        if folder is not None:
            write_text(_memory_of(path, _FOLDER), os.fspath(Path(folder).resolve()))


def remembered_folder(path: Path) -> Path | None:
    """Return the image folder that this user named for an index: the one in index.json may be anybody's choice."""
    with suppress(InputError):
        return Path(read_text_limited(_memory_of(path, _FOLDER)))
    return None


def _remembered_bundle(path: Path, index: Index) -> Path:
    """Return the bundle that this user named for an index: the one that index.json names may be anybody's choice."""
    with suppress(InputError):
        bundle = Path(read_text_limited(_memory_of(path, index.model)))
        if is_bundle(bundle):
            return bundle
    raise InputError(
        f"The bundle of the index {path} is not known, or it was moved.",
        hint=f"name it with {{bundle}}; where the index was made, it was {index.bundle}",
        option="bundle",
    )


def _memory_of(path: Path, model: str) -> Path:
    return cache_home() / "indexes" / hashlib.sha256(os.fsencode(f"{path.resolve()}\0{model}")).hexdigest()


def require_same_model(encoder: BundleEncoder, index: Index, path: Path) -> None:
    """Raise InputError unless a bundle is the one that created the index at `path`."""
    if model_key(encoder.manifest) != index.model:
        raise InputError(
            f"The bundle {encoder.folder} is not the one that created the index {path}.",
            hint=f"create it again: clip-rd-edge index {encoder.folder} {index.folder} -o {path}",
        )


def _text_or_image(query: str) -> str | Path:
    """Return the path of the image that a query names, or else the query, which is a text."""
    if not query.strip():
        raise InputError("The query is empty.", hint='pass a text, such as "a red car", or the path of an image')
    path = expand_home(query)
    with suppress(OSError, ValueError):  # a text may be too long for a path
        if path.is_file():
            return path
        if looks_like_path(query, suffixes=IMAGE_SUFFIXES):
            raise InputError(
                f"The query {quoted(query)} looks like the path of an image, but there is no such file."
                f"{near_files(path)}",
                hint="check the path, or describe the image in words",
            )
    return query


def open_graph(path: Path, index: Index, *, memory_mapped: bool = True) -> Graph | None:
    """Open the graph of an index; None if it has none, or it cannot be used here: then search is exact."""
    if index.graph is None or not usearch_is_installed():
        return None
    try:
        keys = load_array(keys_file(path, index))
        if keys.shape != (len(index.entries),) or keys.dtype != np.uint64:
            return None
        return restore_graph(path, index.graph, keys, memory_mapped=memory_mapped)
    except Exception:  # noqa: BLE001 — whatever it is, comparing all rows answers as well
        return None
