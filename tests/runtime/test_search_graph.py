"""Approximate search, with usearch where it is installed, and else with a stand-in that compares all rows."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from support import Watch

from clip_rd_edge.bundle.encoder import normalise
from clip_rd_edge.errors import ConfigError, DiskFullError
from clip_rd_edge.runtime import index_update as indexing
from clip_rd_edge.runtime.index import (
    MAX_TOP,
    Entry,
    Index,
    build_graph,
    is_worn,
    moved_rows,
    nearest,
    open_graph,
    read_graph,
    read_index,
    search_index,
    usearch_is_installed,
    write_content,
    write_graph,
    write_index,
    write_rows,
)
from clip_rd_edge.runtime.index_update import update_index
from clip_rd_edge.runtime.load import load
from clip_rd_edge.utils.files import disk_full_error

SIZE = 32


class StandIn:
    """The parts of usearch's index that are used; `searches` counts them."""

    searches = 0

    def __init__(self, *, ndim: int, metric: str, dtype: str, **settings: int) -> None:
        assert (metric, dtype) == ("ip", "f16")
        self.ndim = ndim
        self.rows = np.zeros((0, ndim), dtype=np.float16)
        self.keys = np.zeros(0, dtype=np.uint64)

    def add(self, keys: Any, rows: Any, *, threads: int) -> None:
        self.keys = np.concatenate([self.keys, keys.astype(np.uint64)])
        self.rows = np.concatenate([self.rows, rows.astype(np.float16)])

    def search(self, query: Any, count: int) -> Any:
        StandIn.searches += 1
        found = ModuleType("matches")
        found.keys = self.keys[np.argsort(-(self.rows.astype(np.float32) @ query))[:count]]  # type: ignore[attr-defined]
        return found

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def serialized_length(self) -> int:
        return 128 + self.rows.nbytes

    def save(self, path: str) -> None:
        try:
            with Path(path).open("wb") as file:
                np.save(file, self.rows)
                np.save(file, self.keys)
        except OSError:
            raise RuntimeError("Failed to serialize into stream") from None

    @classmethod
    def restore(cls, path: str, *, view: bool) -> StandIn:
        graph = cls(ndim=SIZE, metric="ip", dtype="f16")
        with Path(path).open("rb") as file:
            graph.rows, graph.keys = np.load(file), np.load(file)
        return graph


@pytest.fixture(autouse=True)
def usearch(monkeypatch: pytest.MonkeyPatch) -> None:
    if usearch_is_installed():
        return
    module = ModuleType("usearch.index")
    module.Index = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "usearch", ModuleType("usearch"))
    monkeypatch.setitem(sys.modules, "usearch.index", module)
    for name in ("update", "graph"):
        monkeypatch.setattr(f"clip_rd_edge.runtime.index.{name}.usearch_is_installed", lambda: True)


def embeddings(count: int, seed: int = 0) -> Any:
    return normalise(np.random.default_rng(seed).standard_normal((count, SIZE)).astype(np.float32))


def written(path: Path, rows: Any) -> Index:
    entries = [
        Entry(path=f"{i}.jpg", size_bytes=i, modified_ns=i, changed_ns=i, sha256=str(i)) for i in range(len(rows))
    ]
    empty = Index(folder="/photos", bundle="/b", model="", embeddings="", entries=entries)
    return write_index(path, empty, rows)


def test_what_the_graph_finds_is_ranked_by_exact_similarity(tmp_path: Path) -> None:
    rows = embeddings(2000)
    index = written(tmp_path, rows)
    graph = open_graph(tmp_path, write_graph(tmp_path, build_graph(rows, threads=1)), len(rows))
    assert graph is not None
    recalls = []
    for query in embeddings(20, seed=1):
        exact = nearest(index, rows, query, top=10)
        found = nearest(index, rows, query, top=10, graph=graph)
        assert [hit.similarity for hit in found] == sorted((hit.similarity for hit in found), reverse=True)
        similarities = {hit.path: hit.similarity for hit in exact}
        shared = [hit for hit in found if hit.path in similarities]
        assert all(hit.similarity == pytest.approx(similarities[hit.path], abs=1e-6) for hit in shared)
        recalls.append(len(shared) / 10)
    assert np.mean(recalls) > 0.95
    assert len(nearest(index, rows, rows[0], top=MAX_TOP + 1, graph=graph)) == MAX_TOP + 1  # exact
    assert len(nearest(index, rows, rows[0], top=500, graph=graph)) == 500


def test_texts_find_their_images_though_they_are_far_from_all(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    rng = np.random.default_rng(0)
    subjects = rng.standard_normal((400, SIZE)).astype(np.float32)
    noise = rng.standard_normal((40_000, SIZE)).astype(np.float32)
    rows = normalise(subjects[np.arange(40_000) // 100] + 0.7 * noise)
    texts = normalise(0.25 * subjects[:40] + rng.standard_normal((40, SIZE)).astype(np.float32))
    index = written(tmp_path, rows)
    graph = open_graph(tmp_path, write_graph(tmp_path, build_graph(rows, threads=1)), len(rows))
    shared = []
    for query in texts:
        exact, found = ({hit.path for hit in nearest(index, rows, query, top=10, graph=g)} for g in (None, graph))
        shared.append(len(exact & found) / 10)
    assert np.mean(shared) > 0.99
    assert min(shared) >= 0.8


def test_rows_that_a_graph_does_not_have_are_found_and_lost_ones_are_not(tmp_path: Path) -> None:
    rows = embeddings(300)
    index = written(tmp_path, rows)
    files = write_graph(tmp_path, build_graph(rows[:200], threads=1))
    graph = open_graph(tmp_path, files, 300)
    assert graph is not None
    assert graph.others.tolist() == list(range(200, 300))
    for row in (5, 250):
        assert nearest(index, rows, rows[row], top=1, graph=graph)[0].path.name == f"{row}.jpg"
    kept = np.array([7, 3, 299])  # the others were deleted
    moved = moved_rows(graph.rows, kept, 300)
    assert (moved[7], moved[3], moved[5]) == (0, 1, -1)
    assert moved_rows(moved, np.array([1]), 3)[[3, 7, 5]].tolist() == [0, -1, -1]


def test_images_are_found_though_all_that_were_near_the_query_are_gone(tmp_path: Path) -> None:
    alike = normalise(embeddings(1)[0] + 0.01 * embeddings(150, seed=1))
    others = embeddings(1850, seed=2)
    graph = open_graph(tmp_path, write_graph(tmp_path, build_graph(np.concatenate([alike, others]), threads=1)), 2000)
    assert graph is not None
    left = graph._replace(rows=moved_rows(graph.rows, np.arange(150, 2000), 2000))  # less than a tenth is gone
    index = written(tmp_path / "left", others)
    found, exact = nearest(index, others, alike[0], top=5, graph=left), nearest(index, others, alike[0], top=5)
    assert [hit.path for hit in found] == [hit.path for hit in exact]


def test_copies_of_an_image_are_found_together_and_hide_no_other(tmp_path: Path) -> None:
    """They would be linked to each other alone."""
    distinct, frames = embeddings(1500), embeddings(4, seed=1)
    order = np.random.default_rng(2).permutation(4500)
    places = np.argsort(order)  # of the images, then of 750 copies of each frame
    rows = np.concatenate([distinct, np.repeat(frames, 750, axis=0)])[order]
    index = written(tmp_path, rows)
    built = build_graph(rows, threads=1)
    assert built is not None
    assert len(built.index) == 1504
    files = write_graph(tmp_path, built)
    graph = open_graph(tmp_path, files, len(rows))
    assert graph is not None
    assert len(graph.others) == 0
    found = [nearest(index, rows, row, top=1, graph=graph)[0].path.name for row in distinct]
    assert np.mean([name == f"{place}.jpg" for name, place in zip(found, places, strict=False)]) > 0.99
    exact = nearest(index, rows, frames[0], top=20)
    assert [hit.path for hit in nearest(index, rows, frames[0], top=20, graph=graph)] == [hit.path for hit in exact]
    last = max(places[1500:2250])
    kept = np.sort([*places[[*range(1500), *range(2250, 4500)]].tolist(), last])  # one copy of a frame is left
    files = write_rows(tmp_path, files, moved_rows(graph.rows, kept, len(rows)), built.firsts)
    left = open_graph(tmp_path, files, len(kept))
    assert left is not None
    index = written(tmp_path / "left", rows[kept])
    (hit,) = nearest(index, rows[kept], frames[0], top=1, graph=left)
    assert hit.path.name == f"{kept.tolist().index(last)}.jpg"


def test_a_worn_graph_is_one_that_lost_or_lacks_a_tenth() -> None:
    rows = np.arange(100)
    assert not is_worn(rows, 110)
    assert is_worn(rows, 111)
    assert is_worn(np.where(rows < 11, -1, rows), 89)
    assert not is_worn(np.where(rows < 10, -1, rows), 90)


@pytest.mark.parametrize("memory_mapped", [False, True])
def test_a_graph_whose_links_are_damaged_is_not_opened(tmp_path: Path, *, memory_mapped: bool) -> None:
    """They would lead usearch out of its memory."""
    rows = embeddings(50)
    files = write_graph(tmp_path, build_graph(rows, threads=1))
    content = bytearray((tmp_path / files.file).read_bytes())
    for at in (0, len(content) - 40, len(content) - 1):
        damaged = content.copy()
        damaged[at] ^= 0x10
        (tmp_path / files.file).write_bytes(damaged)
        assert open_graph(tmp_path, files, 50, memory_mapped=memory_mapped) is None
    (tmp_path / files.file).write_bytes(content[:-1])
    assert open_graph(tmp_path, files, 50, memory_mapped=memory_mapped) is None


def test_the_rows_that_a_graph_proposes_are_checked_and_its_own_are_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_rd_edge.runtime.index._BLOCK_ROWS", 1)
    rows = embeddings(900)
    index = written(tmp_path, rows)
    files = write_graph(tmp_path, build_graph(rows, threads=1))
    index = msgspec.structs.replace(index, graph=files)
    graph = open_graph(tmp_path, files, 900)
    damaged = rows.copy()
    damaged[7, 3] += 0.01
    assert nearest(index, damaged, -rows[7], top=1, graph=graph, checked=False)  # compared with other blocks alone
    with pytest.raises(ConfigError, match="damaged"):
        nearest(index, damaged, rows[7], top=1, graph=graph, checked=False)
    content = bytearray((tmp_path / files.rows).read_bytes())
    for at in range(130, len(content), 999):
        content[at] ^= 1
        (tmp_path / files.rows).write_bytes(content)
        assert open_graph(tmp_path, files, 900) is None
        content[at] ^= 1


def test_search_is_exact_if_the_graph_fails(tmp_path: Path) -> None:
    rows = embeddings(50)
    index = written(tmp_path, rows)
    graph = open_graph(tmp_path, write_graph(tmp_path, build_graph(rows, threads=1)), 50)
    assert graph is not None

    class Failing:
        def search(self, *_: object) -> None:
            raise RuntimeError("Out of memory!")

    assert nearest(index, rows, rows[7], top=3, graph=graph._replace(index=Failing())) == nearest(
        index, rows, rows[7], top=3
    )


def test_a_graph_that_cannot_be_used_leaves_search_exact(tmp_path: Path) -> None:
    rows = embeddings(50)
    files = write_graph(tmp_path, build_graph(rows, threads=1))
    assert open_graph(tmp_path, files, 50) is not None
    assert open_graph(tmp_path, files, 40) is None  # rows beyond the index
    assert open_graph(tmp_path, msgspec.structs.replace(files, keys=49), 50) is None
    (tmp_path / files.file).write_bytes(b"no graph")
    assert open_graph(tmp_path, files, 50) is None
    (tmp_path / files.file).unlink()
    assert open_graph(tmp_path, files, 50) is None


@pytest.fixture
def many_images(colour_images: Path) -> Path:
    for i in range(40):
        Image.new("RGB", (9, 9), (5 * i, 50, 250 - 5 * i)).save(colour_images / f"{i:03}.png")
    return colour_images


def test_an_index_above_the_threshold_gets_a_graph_that_updates_keep(
    colour_bundle: Path, many_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "GRAPH_FROM", 40)
    encoder, path = load(colour_bundle), tmp_path / "index"
    assert update_index(encoder, many_images, path).approximate
    built = read_index(path)[0].graph
    assert built is not None
    assert built.keys == 44
    Image.new("RGB", (9, 9), (0, 255, 3)).save(many_images / "new.png")
    (many_images / "003.png").unlink()
    assert update_index(encoder, many_images, path).approximate
    index, _ = read_index(path)
    assert index.graph is not None
    assert (index.graph.file, index.graph.keys) == (built.file, 44)
    assert {file.name for file in path.iterdir()} == {
        "index.json", index.embeddings, index.graph.file, index.graph.rows
    }  # fmt: skip
    graph = read_graph(path, index)
    assert graph is not None
    assert [index.entries[row].path for row in graph.others] == ["new.png"]
    (many_images / "broken.png").write_bytes(b"no image")
    files = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert update_index(encoder, many_images, path).approximate
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == files
    (many_images / "broken.png").unlink()
    for query in ("green", "blue", "red"):
        approximate = search_index(path, query, top=5)
        assert approximate == search_index(path, query, top=5, exact=True)
    for i in range(10):
        Image.new("RGB", (9, 9), (7, 11 * i, 200)).save(many_images / f"more{i}.png")
    update_index(encoder, many_images, path)
    rebuilt = read_index(path)[0].graph
    assert rebuilt is not None
    assert (rebuilt.keys, rebuilt.file == built.file) == (54, False)
    for file in list(many_images.glob("0*.png")):
        file.unlink()
    assert not update_index(encoder, many_images, path).approximate
    assert {file.name.partition("-")[0] for file in path.iterdir()} == {"index.json", "embeddings"}


def test_an_index_that_was_damaged_gets_another_graph_with_its_embeddings(
    colour_bundle: Path, many_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "GRAPH_FROM", 40)
    monkeypatch.setattr("clip_rd_edge.runtime.index._BLOCK_ROWS", 4)
    encoder, path = load(colour_bundle), tmp_path / "index"
    update_index(encoder, many_images, path)
    expected = search_index(path, "red", top=44, exact=True)
    index = read_index(path)[0]
    (path / index.embeddings).write_bytes((path / index.embeddings).read_bytes()[:-1] + b"\0")
    assert update_index(encoder, many_images, path).embedded == 4
    assert search_index(path, "red", top=44) == search_index(path, "red", top=44, exact=True) == expected
    assert read_index(path)[0].graph != index.graph


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("spoil", [Path.unlink, _cut])
@pytest.mark.parametrize("pattern", ["graph-*.usearch", "graph-rows-*"])
def test_a_graph_that_cannot_be_used_is_built_again(
    spoil: Callable[[Path], None],
    pattern: str,
    colour_bundle: Path,
    many_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(indexing, "GRAPH_FROM", 40)
    encoder, path = load(colour_bundle), tmp_path / "index"
    update_index(encoder, many_images, path)
    (file,) = path.glob(pattern)
    spoil(file)
    with monkeypatch.context() as missing:
        for name in ("update", "graph"):
            missing.setattr(f"clip_rd_edge.runtime.index.{name}.usearch_is_installed", lambda: False)
        reporter = Watch()
        assert not update_index(encoder, many_images, path, reporter=reporter).approximate
        assert "search stays exact" in reporter.said[0]
    assert update_index(encoder, many_images, path).approximate
    assert read_graph(path, read_index(path)[0]) is not None
    assert len(list(path.glob("graph-*"))) == 2


def test_without_usearch_search_stays_exact_and_says_so(
    colour_bundle: Path, many_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "GRAPH_FROM", 40)
    encoder, path = load(colour_bundle), tmp_path / "index"
    with monkeypatch.context() as missing:
        missing.setattr("clip_rd_edge.runtime.index_update.usearch_is_installed", lambda: False)
        reporter = Watch()
        assert not update_index(encoder, many_images, path, reporter=reporter).approximate
        assert "search stays exact" in reporter.said[0]
        assert "usearch" in reporter.said[0]
    assert update_index(encoder, many_images, path).approximate  # nothing new but the package
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    for name in ("update", "graph"):
        monkeypatch.setattr(f"clip_rd_edge.runtime.index.{name}.usearch_is_installed", lambda: False)
    reporter = Watch()
    assert not update_index(encoder, many_images, path, reporter=reporter).approximate  # here
    assert "search stays exact" in reporter.said[0]
    assert read_graph(copy, read_index(copy)[0]) is None
    assert len(search_index(copy, "blue", top=3, bundle=encoder.folder)) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_graph_for_which_there_is_no_space_is_a_full_disk_and_leaves_nothing(tmp_path: Path) -> None:
    import resource

    graph = build_graph(embeddings(2000), threads=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as error:
            write_graph(tmp_path, graph)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert disk_full_error(error.value) is not None
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_cannot_fit_on_the_disk_is_not_built_and_search_is_exact_meanwhile(
    colour_bundle: Path, many_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, path = load(colour_bundle), tmp_path / "index"
    update_index(encoder, many_images, path)
    for name in ("graph-0123456789ab.usearch", ".graph-0123456789ab.usearch.0123.tmp"):
        (path / name).write_bytes(b"half of a")
    monkeypatch.setattr(indexing, "GRAPH_FROM", 40)
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(DiskFullError, match="is an index of the 44 images"):
            update_index(encoder, many_images, path)
    assert {file.name.partition("-")[0] for file in path.iterdir()} == {"index.json", "embeddings"}
    assert len(search_index(path, "blue", top=3)) == 3
    assert update_index(encoder, many_images, path).approximate


def test_an_index_names_no_file_outside_of_it(tmp_path: Path) -> None:
    rows = embeddings(3)
    index = written(tmp_path, rows)
    files = msgspec.structs.replace(write_graph(tmp_path, build_graph(rows, threads=1)), rows="../rows.npy")
    write_content(tmp_path, msgspec.structs.replace(index, graph=files))
    with pytest.raises(ConfigError, match=r"names the file '\.\./rows\.npy', which is not inside the index"):
        read_index(tmp_path)
