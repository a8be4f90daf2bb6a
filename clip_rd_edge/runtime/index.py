"""An index of an image folder, to search by text or image.

    index.json           image folder, bundle, and per image its path, size, times and SHA-256; and its own CRC-32
    embeddings-KEY.npy   the images' embeddings, (N, D) float32, one row per entry; index.json has a CRC-32 per block
    graph-KEY.…          from a million images on: for approximate search, see `runtime.index`
    next/                the index that will replace this one, of another model, once all images are in it

index.json names its embeddings file and is written last and atomically: if indexing is interrupted, the folder still
holds a valid, older index. Writers wait for each other (`utils.outputs`). Readers take no lock, so that a folder that
they cannot write to can be searched: if the embeddings are gone that index.json named, they read the new index.json.

Blocks of rows are checked when they are read, which takes a second for a million rows of 512 entries. A search refuses
those that have changed on the disk, and an update embeds their images again.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import threading
import uuid
import zlib
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.encoder import Embeddings, require_cosines, require_top, top_indices
from clip_rd_edge.bundle.image_files import IMAGE_SUFFIXES
from clip_rd_edge.bundle.images import ImageInput, as_rgb
from clip_rd_edge.bundle.manifest import Manifest, is_bundle
from clip_rd_edge.errors import ConfigError, InputError, quoted
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.load import load
from clip_rd_edge.utils.arrays import load_array
from clip_rd_edge.utils.files import is_plain_name, new_file, read_text_limited, write_bytes, write_text
from clip_rd_edge.utils.paths import cache_home, exists, expand_home, is_file, is_folder, looks_like_path, near_files
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import read_versioned_json

INDEX_VERSION = 1
INDEX_FILE, NEXT, _ROWS = "index.json", "next", "embeddings-"
_MAKE_ANEW = "delete it and index the folder again"
_BLOCK_ROWS = 64  # per checksum: an approximate search reads about 128 rows, of as many blocks
_PART_BYTES = 1 << 20  # of index.json: decoding it takes some milliseconds
_BETWEEN = re.compile(rb'"\],\["')  # two entries


class Entry(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """An indexed image; `path` is relative to the image folder, with / as separator.

    Attributes:
        changed_ns: the time of the last change (on Windows, of the creation), which no tool puts back.
    """

    path: str
    size_bytes: int
    modified_ns: int
    changed_ns: int
    sha256: str


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """The content of index.json.

    Attributes:
        folder: absolute path of the image folder.
        bundle: absolute path of the bundle that embedded the images.
        model: `model_key` of that bundle.
        embeddings: name of the embeddings file, which has one row per entry.
        crc32s: of its blocks of _BLOCK_ROWS rows.
        graph: the files of approximate search; None if search is exact.
        missing: number of images that were still to be embedded when it was saved, or whose disk had gone away.
        listed_ns: when the listing of the folder began that the entries are from, by the clock of the index's folder;
            0 if not known.
    """

    folder: str
    bundle: str
    model: str
    embeddings: str
    entries: list[Entry]
    crc32s: list[int] = []
    graph: GraphFiles | None = None
    missing: int = 0
    listed_ns: int = 0


class _Undecoded(Index, frozen=True, kw_only=True):
    """The content of index.json with its entries as text."""

    entries: msgspec.Raw  # type: ignore[assignment]


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
        missing: number of images that are not in it yet, because indexing was interrupted or is still running, or
            their disk went away while it ran.
    """

    indexed: int = 0
    missing: int = 0


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
        memory_mapped: whether the embeddings stay in their file. Where that is cut, or goes from a network share, the
            process ends with SIGBUS, which one that runs for long cannot risk.
    """
    if not is_index(path):
        raise InputError(f"{path} is not an index: it has no {INDEX_FILE}.", hint="create one with clip-rd-edge index")
    missing = ""
    while True:
        index = _read(path)
        for name in (index.embeddings, *((index.graph.file, index.graph.rows) if index.graph else ())):
            if not is_plain_name(name):
                raise ConfigError(f"{path / INDEX_FILE} names the file {name!r}, which is not inside the index.")
        try:
            rows = load_array(path / index.embeddings, memory_mapped=memory_mapped)
            break
        except (OSError, ValueError, EOFError) as error:
            if isinstance(error, FileNotFoundError) and index.embeddings != missing:
                missing = index.embeddings  # a writer may have replaced both files since index.json was read
                continue
            raise ConfigError(f"The index {path} is damaged: {error}.", hint=_MAKE_ANEW) from error
    is_matrix = rows.ndim == 2 and rows.dtype == np.float32 and rows.flags.c_contiguous
    if not is_matrix or len(rows) != len(index.entries) or len(index.crc32s) != len(_blocks(rows)):
        raise ConfigError(
            f"The index {path} has {len(index.entries)} images but embeddings of shape {rows.shape} and type "
            f"{rows.dtype}.",
            hint=_MAKE_ANEW,
        )
    if not memory_mapped:
        _require_intact(index, rows)
    return index, rows


def indexed_folder(path: Path) -> str:
    """Return the path of the image folder of an index, without decoding its entries; raises as `read_index`."""
    return _read(path, entries=False).folder


def _read(path: Path, *, entries: bool = True) -> Index:
    try:
        file = read_versioned_json(path / INDEX_FILE, _File, newest=INDEX_VERSION, key="version")
        if zlib.crc32(file.index) != file.crc32:
            raise ConfigError(f"{INDEX_FILE} has changed since it was written: its checksum differs.")
        content = msgspec.json.decode(file.index, type=_Undecoded)
        decoded = _decode_in_parts(content.entries) if entries else []
        for entry in decoded:
            if _is_elsewhere(entry.path):
                raise ConfigError(f"it names the image {entry.path!r}, which is not in its folder")
    except (ConfigError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        if isinstance(error, ConfigError) and error.hint:
            raise
        raise ConfigError(f"The index {path} is damaged: {str(error).rstrip('.')}.", hint=_MAKE_ANEW) from error
    return Index(**{**msgspec.structs.asdict(content), "entries": decoded})


def _is_elsewhere(name: str) -> bool:
    """Return whether the path of an image leads out of the image folder."""
    if name and ".." not in name and name[0] not in "/\\" and ":" not in name:
        return False  # of nearly all images, in little time
    path = PurePath(name)
    return not name or ".." in path.parts or bool(path.anchor)


def _decode_in_parts(text: msgspec.Raw) -> list[Entry]:
    """Decode the entries of index.json, some thousands at a time, so that other threads run in between.

    Quotes in a path are escaped, so that what looks like the end of an entry is one, or else all of a path: then what
    is before it is no JSON.
    """
    content, decoder = memoryview(text), msgspec.json.Decoder(list[Entry])
    entries: list[Entry] = []
    opening, start = b"", 0
    while cut := _BETWEEN.search(content, start + _PART_BYTES):
        end = cut.end() - len(',["')
        try:
            entries += decoder.decode(b"".join((opening, content[start:end], b"]")))
        except msgspec.DecodeError:
            return decoder.decode(content)
        opening, start = b"[", end + 1
    entries += decoder.decode(b"".join((opening, content[start:])))
    return entries


def write_index(path: Path, index: Index, rows: Embeddings) -> Index:
    """Write an index, replacing the one at `path`; return it with the new name of its embeddings file.

    Call this with the folder locked: it deletes what older writers have left.
    """
    old_files = leftovers(path, index.graph)
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    header = io.BytesIO()  # of the .npy file; the rows of a large index are not copied
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(rows))
    name = f"{_ROWS}{uuid.uuid4().hex[:12]}.npy"
    write_bytes(path / name, header.getvalue(), rows.data)
    index = msgspec.structs.replace(index, embeddings=name, crc32s=[_crc32(rows, block) for block in _blocks(rows)])
    write_content(path, index)
    delete(old_files)
    return index


def write_content(path: Path, index: Index) -> None:
    """Write index.json, whose embeddings are there."""
    content = msgspec.json.encode(index)
    head = b'{"version":%d,"crc32":%d,"index":' % (INDEX_VERSION, zlib.crc32(content))
    write_bytes(path / INDEX_FILE, head, content, b"}")


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
    entries = [index.entries[row] for row in kept.tolist()]
    return msgspec.structs.replace(index, entries=entries, graph=None), rows[kept]


def _require_intact(index: Index, rows: Embeddings, chosen: Rows | None = None) -> None:
    """Raise ConfigError if rows, all or the chosen ones, have changed since they were written."""
    blocks = _blocks(rows) if chosen is None else np.unique(chosen // _BLOCK_ROWS).tolist()
    if damaged := _damaged(index, rows, blocks):
        raise ConfigError(
            f"The index of {index.folder} is damaged: {len(damaged):,} of its blocks of {_BLOCK_ROWS} embeddings have "
            f"changed on the disk, the first with that of {index.entries[damaged[0] * _BLOCK_ROWS].path}.",
            hint="index the folder again, which embeds these images again",
        )


def delete(files: set[Path]) -> None:
    """Delete files, but those that another process has open on Windows, which cannot: the next update does."""
    for file in files:
        with suppress(OSError):
            file.unlink()


def leftovers(path: Path, graph: GraphFiles | None = None) -> set[Path]:
    """Return the files of a writer other than index.json and `graph`: also what a kill left half written."""
    patterns = (f"{_ROWS}*.npy", f".{_ROWS}*.tmp", f".{INDEX_FILE}.*.tmp", GRAPH_FILES, f".{GRAPH_FILES}.tmp")
    files = {file for pattern in patterns for file in path.glob(pattern)}
    return files - ({path / graph.file, path / graph.rows} if graph else set())


def nearest(
    index: Index,
    rows: Embeddings,
    query: Embeddings,
    *,
    top: int,
    graph: Graph | None = None,
    checked: bool = True,
) -> list[Hit]:
    """Return the images nearest to a query embedding, (D,) or (1, D), nearest first; ties keep the index's order.

    Without a graph, or for more than MAX_TOP results, the search is exact: one matrix product over all rows, limited by
    memory bandwidth. For 100,000 images it takes less time than reading index.json. With a graph, only the rows that it
    proposes are compared, if it proposes enough: `python -m benchmarks.devices.search 100000 --graph` measures both.

    Args:
        checked: whether the rows are known to be intact; else those that are compared are checked now.
    """
    query = query.reshape(-1)
    if rows.shape[1] != len(query):
        raise ConfigError(
            f"The index has embeddings of {rows.shape[1]} entries; expected {len(query)}, the model's.",
            hint=_MAKE_ANEW,
        )
    candidates = graph.candidates(query, top) if graph is not None and top <= MAX_TOP else None
    if candidates is not None:
        candidates = np.sort(candidates)
    if not checked:
        _require_intact(index, rows, candidates)
    compared = rows if candidates is None else rows[candidates]
    similarities = require_cosines(np.asarray(compared @ query), "An image of the index, or the query,")
    best = top_indices(similarities, top)
    numbers = best if candidates is None else candidates[best]
    return [
        Hit(Path(index.folder, index.entries[number].path), float(similarities[i]))
        for i, number in zip(best.tolist(), numbers.tolist(), strict=True)
    ]


def read_graph(path: Path, index: Index, *, memory_mapped: bool = True) -> Graph | None:
    """Open the graph of an index; None if it has none, or it cannot be used here: then search is exact.

    Args:
        memory_mapped: as for `read_index`.
    """
    if index.graph is None:
        return None
    return open_graph(path, index.graph, len(index.entries), memory_mapped=memory_mapped)


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
    require_top(top)
    if isinstance(query, str) and not query.strip():
        raise InputError("The query is empty.", hint='pass a text, such as "a red car", or the path of an image')
    if isinstance(query, str):
        query = _text_or_image(query)
    index, rows = read_index(path)
    if folder is not None:
        _require_images(Path(folder), path, index)
        index = msgspec.structs.replace(index, folder=os.fspath(folder))
    encoder = load(bundle or _remembered_bundle(path, index), **options)
    require_same_model(encoder, index, path)
    remember_bundle(path, encoder)
    embedding = encoder.encode_texts([query]) if isinstance(query, str) else encoder.encode_images([as_rgb(query)])
    graph = None if exact else read_graph(path, index)
    hits = Hits(nearest(index, rows, embedding, top=top, graph=graph, checked=False))
    hits.indexed, hits.missing = len(index.entries), index.missing
    return hits


def remember_bundle(path: Path, encoder: BundleEncoder) -> None:
    """Remember in the user's cache the bundle that was named for the index at `path`."""
    with suppress(OSError):  # a full or read-only cache: the bundle is then to be named again
        write_text(_memory_of(path, model_key(encoder.manifest)), os.fspath(encoder.folder.resolve()))


def _remembered_bundle(path: Path, index: Index) -> Path:
    """Return the bundle that this user named for an index: the one that index.json names may be anybody's choice."""
    try:
        bundle = Path(read_text_limited(_memory_of(path, index.model)))
    except InputError:
        raise InputError(
            f"It is not known which bundle goes with the index {path}: this account has neither made nor searched it.",
            hint=f"name it with {{bundle}}; where the index was made, it was {index.bundle}", option="bundle",
        ) from None  # fmt: skip
    if not is_bundle(bundle):
        raise InputError(
            f"The bundle that created the index {path} is not at {bundle} any more.",
            hint="name its current path with {bundle}", option="bundle",
        )  # fmt: skip
    return bundle


def _memory_of(path: Path, model: str) -> Path:
    return cache_home() / "indexes" / hashlib.sha256(os.fsencode(f"{path.resolve()}\0{model}")).hexdigest()


def require_same_model(encoder: BundleEncoder, index: Index, path: Path) -> None:
    """Raise InputError unless a bundle is the one that created the index at `path`."""
    if model_key(encoder.manifest) != index.model:
        raise InputError(
            f"The bundle {encoder.folder} is not the one that created the index {path}.",
            hint=f"create it again: clip-rd-edge index {encoder.folder} {index.folder} -o {path}",
        )


def _require_images(folder: Path, path: Path, index: Index) -> None:
    """Refuse a folder that has none of the index's images, none of whose results would exist."""
    if not is_folder(folder):
        problem = "is not a folder" if exists(folder) else "does not exist"
        raise InputError(f"The image folder {folder} {problem}.{near_files(folder)}", hint="check {folder}")
    if index.entries and not any(is_file(folder / entry.path) for entry in index.entries):
        raise InputError(
            f"The folder {folder} has none of the {len(index.entries):,} images of the index {path}, such as "
            f"{index.entries[0].path}.",
            hint=f"name the folder that was at {index.folder} when it was indexed",
        )


def _text_or_image(query: str) -> str | Path:
    """Return the path of the image that a query names, or else the query, which is a text."""
    path = expand_home(query)
    with suppress(OSError, ValueError):  # a text may be too long for a path
        if path.is_file():
            return path
        if looks_like_path(query, suffixes=IMAGE_SUFFIXES):
            if path.is_dir():
                raise InputError(
                    f"The query {quoted(query)} is a folder; expected a text or the path of an image.",
                    hint="name one of its images",
                )
            raise InputError(
                f"The query {quoted(query)} looks like the path of an image, but there is no such file."
                f"{near_files(path)}",
                hint="check the path, or describe the image in words",
            )
    return query


GRAPH_FROM = 1_000_000  # images: below, comparing all rows takes less than 60 ms
MAX_TOP = 1_000  # results; more are searched exactly
REBUILD_SHARE = 0.1
# Of usearch: links per node, and nodes visited when building and when searching. Higher is more accurate, and slower.
# 256 would do for images as queries, since links are between similar images; a text is far from all, and needs more.
_LINKS, _VISITED_BUILDING, _VISITED_SEARCHING = 16, 64, 4096
_CANDIDATES = 128  # ranked exactly, or 4 per result
_BLOCK = 1 << 20  # bytes that are read or written at once
_CHUNK = 10_000  # rows between two reports of progress
GRAPH_FILES = "graph-*"  # names of the files
_HEADER_BYTES = 64
_BYTES_PER_KEY = 128  # at least, of its links

Rows = npt.NDArray[np.int64]


class GraphFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The graph of an index, as index.json names it.

    Attributes:
        file, rows: names of the two files.
        keys: number of images that it was built from.
        links_at: where its links begin in `file`, behind the embeddings.
        crc32: of the links.
        rows_crc32: of `rows`.
    """

    file: str
    rows: str
    keys: int
    links_at: int = 0
    crc32: int = -1
    rows_crc32: int = -1


class Graph(NamedTuple):
    """An opened graph.

    Attributes:
        index: usearch's index.
        rows: the present row of each key, or -1.
        others: rows that it does not have.
        keys: those whose images are there, sorted by `firsts`.
        firsts: of each of `keys`, the key in the graph that has the same embedding.
    """

    index: Any
    rows: Rows
    others: Rows
    keys: Rows
    firsts: Rows

    def candidates(self, query: Embeddings, top: int) -> Rows | None:
        """Return the rows that may be among the `top` nearest to a query (D,).

        None if the graph proposes fewer than `top` images that are still there: the others near the query are gone,
        such as with a folder of similar images; or if it fails.
        """
        count = max(_CANDIDATES, 4 * top)
        try:
            found = self.index.search(query, count).keys.astype(np.int64)
        except RuntimeError:
            return None
        start = np.searchsorted(self.firsts, found)
        copies = np.minimum(np.searchsorted(self.firsts, found, side="right") - start, top)
        places = np.repeat(start - (np.cumsum(copies) - copies), copies) + np.arange(copies.sum())
        rows = self.rows[self.keys[places]]  # nearest first
        present = rows[rows >= 0][:count]
        return np.concatenate([present, self.others]) if len(present) >= top else None


class BuiltGraph(NamedTuple):
    """A graph of all images of an index: usearch's index, and of each row the first with the same embedding."""

    index: Any
    firsts: Rows


def usearch_is_installed() -> bool:
    """Return whether usearch is installed."""
    return find_spec("usearch") is not None


def _first_copies(rows: Embeddings) -> Rows:
    """Return, per embedding, the first row that has the same in float16, as the graph has it."""
    weights = np.random.default_rng(0).integers(1 << 64, size=rows.shape[1], dtype=np.uint64)
    keys = np.arange(len(rows))
    digests = np.empty(len(rows), dtype=np.uint64)
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK].astype(np.float16)
        digests[start : start + len(part)] = part.view(np.uint16).astype(np.uint64) @ weights
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    firsts = first[inverse].astype(np.int64)
    copies = keys[firsts != keys]
    for start in range(0, len(copies), _CHUNK):
        some = copies[start : start + _CHUNK]
        differ = (rows[some].astype(np.float16) != rows[firsts[some]].astype(np.float16)).any(axis=1)
        firsts[some[differ]] = some[differ]
    return firsts


def build_graph(
    rows: Embeddings,
    *,
    path: Path | None = None,
    threads: int | None = None,
    stop: threading.Event | None = None,
    reporter: Reporter = SILENT,
) -> BuiltGraph | None:
    """Build the graph of embeddings (N, D), which takes minutes for a million.

    Args:
        path: where it is going to be written.
        stop: ends the work when it is set; then None is returned.
    """
    from usearch.index import Index

    firsts = _first_copies(rows)
    chosen = np.flatnonzero(firsts == np.arange(len(rows)))
    if path is not None and shutil.disk_usage(path).free < len(chosen) * (rows.shape[1] * 2 + _BYTES_PER_KEY):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    graph = Index(
        ndim=rows.shape[1],
        metric="ip",
        dtype="f16",
        connectivity=_LINKS,
        expansion_add=_VISITED_BUILDING,
        expansion_search=_VISITED_SEARCHING,
    )
    for start in range(0, len(chosen), _CHUNK):
        if stop is not None and stop.is_set():
            return None
        keys = chosen[start : start + _CHUNK]
        graph.add(keys, np.asarray(rows[keys]), threads=threads or 0)
        reporter.update("building the search graph", start + len(keys), len(chosen))
    return BuiltGraph(graph, firsts)


def write_graph(path: Path, graph: BuiltGraph) -> GraphFiles:
    """Write a graph into the folder of an index."""
    index, firsts = graph
    name = f"graph-{uuid.uuid4().hex[:12]}.usearch"
    with new_file(path / name) as file:
        try:
            index.save(file.name)
        except RuntimeError:
            _fill(file, index.serialized_length)
            raise
    links_at = len(index) * index.ndim * 2
    crc32 = _crc32_of_links(path / name, links_at)
    files = GraphFiles(file=name, rows="", keys=len(firsts), links_at=links_at, crc32=crc32)
    return write_rows(path, files, np.arange(len(firsts)), firsts)


def _crc32_of_links(path: Path, links_at: int) -> int:
    """Return a checksum of a graph's header and links, which usearch follows wherever they lead.

    Damaged embeddings only make it miss images; they are most of the file, which a search need not read.
    """
    with path.open("rb") as file:
        value = zlib.crc32(file.read(_HEADER_BYTES))
        file.seek(links_at)
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _fill(file: IO[bytes], size: int) -> None:
    """Write a file up to a size, so that the system says why usearch could not, which does not tell."""
    file.seek(0, os.SEEK_END)
    while file.tell() < size:
        file.write(bytes(_BLOCK))
    file.flush()


def write_rows(path: Path, files: GraphFiles, rows: Rows, firsts: Rows) -> GraphFiles:
    """Write the present row of each key, and its first copy, to a new file; return the graph that names it."""
    name = f"graph-rows-{uuid.uuid4().hex[:12]}.npy"
    content = io.BytesIO()
    np.save(content, np.stack([rows, firsts]).astype(np.int64))
    write_bytes(path / name, content.getbuffer())
    return msgspec.structs.replace(files, rows=name, rows_crc32=zlib.crc32(content.getbuffer()))


def read_rows(path: Path, files: GraphFiles) -> tuple[Rows, Rows] | None:
    """Return the row of each key, and its first copy, or None if the file is missing or damaged."""
    try:
        content = (path / files.rows).read_bytes()
        both = load_array(io.BytesIO(content))
    except (OSError, ValueError, EOFError):
        return None
    if zlib.crc32(content) != files.rows_crc32 or both.shape != (2, files.keys) or both.dtype.kind != "i":
        return None
    return both[0].astype(np.int64), both[1].astype(np.int64)


def moved_rows(rows: Rows, kept: Rows, count: int) -> Rows:
    """Return the row of each key after an update.

    Args:
        rows: of each key before it.
        kept: rows before the update that are kept, in their new order.
        count: rows before the update.
    """
    new = np.full(count + 1, -1, dtype=np.int64)  # the last entry is that of the key -1
    new[kept] = np.arange(len(kept))
    return new[rows]


def is_worn(rows: Rows, count: int) -> bool:
    """Return whether a graph has lost, or lacks, so many of `count` images that it should be built again."""
    present = int((rows >= 0).sum())
    return max(len(rows) - present, count - present) > REBUILD_SHARE * max(len(rows), 1)


def open_graph(path: Path, files: GraphFiles, count: int, *, memory_mapped: bool = True) -> Graph | None:
    """Open the graph of an index with `count` images; None if usearch or a file is missing, or damaged."""
    both = read_rows(path, files)
    if both is None or not usearch_is_installed():
        return None
    rows, firsts = both
    from usearch.index import Index

    try:
        if _crc32_of_links(path / files.file, files.links_at) != files.crc32:
            return None
        graph = Index.restore(str(path / files.file), view=memory_mapped)
    except Exception:  # noqa: BLE001 — whatever it is, comparing all rows answers as well
        return None
    if graph is None or len(graph) != (firsts == np.arange(files.keys)).sum() or (rows >= count).any():
        return None
    graph.expansion_search = _VISITED_SEARCHING
    missing = np.ones(count, dtype=bool)
    missing[rows[rows >= 0]] = False
    keys = np.flatnonzero(rows >= 0)
    keys = keys[np.argsort(firsts[keys], kind="stable")]
    return Graph(graph, rows, np.flatnonzero(missing), keys, firsts[keys])
