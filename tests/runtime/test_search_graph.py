"""Approximate search, with usearch where it is installed, and else with a stand-in that compares all rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import Watch

from clip_rd_edge.bundle.encoder import normalise
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.runtime import index as searching
from clip_rd_edge.runtime import index_update as updating
from clip_rd_edge.runtime.index import Entry, Index, nearest, open_graph, read_index, search_index, write_index
from clip_rd_edge.runtime.index_update import update_index
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.search_graph import MAX_TOP, Graph, build_graph, usearch_is_installed

SIZE = 32


class StandIn:
    """The parts of usearch's index that are used."""

    def __init__(self, *, ndim: int, metric: str, dtype: str, **settings: int) -> None:
        assert (metric, dtype) == ("ip", "f16")
        self.rows = np.zeros((0, ndim), dtype=np.float16)
        self.keys = np.zeros(0, dtype=np.uint64)

    def add(self, keys: Any, rows: Any, *, threads: int) -> None:
        self.keys = np.concatenate([self.keys, keys])
        self.rows = np.concatenate([self.rows, rows.astype(np.float16)])

    def search(self, query: Any, count: int) -> Any:
        order = np.argsort(-(self.rows.astype(np.float32) @ query))[:count]
        return SimpleNamespace(keys=self.keys[order])

    def __len__(self) -> int:
        return len(self.rows)

    def save(self, path: str) -> None:
        with Path(path).open("wb") as file:
            np.save(file, self.rows)
            np.save(file, self.keys)

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
    for module in (searching, updating):
        monkeypatch.setattr(module, "usearch_is_installed", lambda: True)


def embeddings(count: int, seed: int = 0) -> Any:
    return normalise(np.random.default_rng(seed).standard_normal((count, SIZE)).astype(np.float32))


def written(path: Path, rows: Any, graph: Any = None) -> Index:
    entries = [
        Entry(path=f"{i}.jpg", size_bytes=i, modified_ns=i, changed_ns=i, sha256=str(i)) for i in range(len(rows))
    ]
    return write_index(
        path, Index(folder="/f", bundle="/b", model="", embeddings="", entries=entries, graph=graph), rows
    )


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Index, Graph]]:
    """Return a function that writes the index of rows with the graph of them, or of others."""
    monkeypatch.setattr(searching, "GRAPH_FROM", 1)

    def make(rows: Any, of: Any = None) -> tuple[Index, Graph]:
        of = rows if of is None else of
        index = written(tmp_path, rows, build_graph(tmp_path, of, threads=1))
        graph = open_graph(tmp_path, index)
        assert graph is not None
        return index, graph

    return make


def test_what_the_graph_finds_is_ranked_by_exact_similarity(make: Any) -> None:
    rows = embeddings(2000)
    index, graph = make(rows)
    recalls = []
    for query in embeddings(20, seed=1):
        exact = {hit.path: hit.similarity for hit in nearest(index, rows, query, top=10)}
        found = nearest(index, rows, query, top=10, graph=graph)
        assert [hit.similarity for hit in found] == sorted((hit.similarity for hit in found), reverse=True)
        shared = [hit for hit in found if hit.path in exact]
        assert all(hit.similarity == pytest.approx(exact[hit.path], abs=1e-6) for hit in shared)
        recalls.append(len(shared) / 10)
    assert np.mean(recalls) > 0.95
    assert len(nearest(index, rows, rows[0], top=MAX_TOP + 500, graph=graph)) == MAX_TOP + 500


def test_rows_that_a_graph_does_not_have_are_found_and_lost_ones_are_not(make: Any) -> None:
    rows = embeddings(300)
    index, graph = make(rows, of=rows[:280])
    assert graph.others.tolist() == list(range(280, 300))
    assert not graph.is_worn
    for row in (5, 290):
        assert nearest(index, rows, rows[row], top=1, graph=graph)[0].path.name == f"{row}.jpg"
    left = np.concatenate([rows[290:], rows[20:280]])  # in another order, as after an update
    index, graph = make(left, of=rows[:280])
    assert nearest(index, left, rows[279], top=1, graph=graph)[0].path.name == "269.jpg"
    assert {hit.path.name for hit in nearest(index, left, rows[3], top=2, graph=graph)} == {
        hit.path.name for hit in nearest(index, left, rows[3], top=2)
    }
    for worn in (rows[:251], np.concatenate([rows[:280], embeddings(29, seed=3)])):  # of 280
        assert make(worn, of=rows[:280])[1].is_worn


def test_images_are_found_though_all_that_were_near_the_query_are_gone(make: Any) -> None:
    alike, others = normalise(embeddings(1)[0] + 0.01 * embeddings(150, seed=1)), embeddings(1850, seed=2)
    index, graph = make(others, of=np.concatenate([alike, others]))
    found, exact = (nearest(index, others, alike[0], top=5, graph=g) for g in (graph, None))
    assert [hit.path for hit in found] == [hit.path for hit in exact]


def test_copies_of_an_image_are_found_together_and_hide_no_other(make: Any) -> None:
    """They would be linked to each other alone."""
    distinct, frames = embeddings(1500), embeddings(4, seed=1)
    order = np.random.default_rng(2).permutation(4500)
    places = np.argsort(order)  # of the images, then of 750 copies of each frame
    rows = np.concatenate([distinct, np.repeat(frames, 750, axis=0)])[order]
    index, graph = make(rows)
    assert len(graph.others) == 0
    found = [nearest(index, rows, row, top=1, graph=graph)[0].path.name for row in distinct]
    assert np.mean([name == f"{place}.jpg" for name, place in zip(found, places, strict=False)]) > 0.99
    exact = nearest(index, rows, frames[0], top=20)
    assert [hit.path for hit in nearest(index, rows, frames[0], top=20, graph=graph)] == [hit.path for hit in exact]
    last = max(places[1500:2250])
    kept = np.sort([*places[[*range(1500), *range(2250, 4500)]].tolist(), last])  # one copy of a frame is left
    index, graph = make(rows[kept], of=rows)
    (hit,) = nearest(index, rows[kept], frames[0], top=1, graph=graph)
    assert hit.path.name == f"{kept.tolist().index(last)}.jpg"


@pytest.mark.parametrize("memory_mapped", [False, True])
def test_a_graph_whose_links_are_damaged_is_not_opened(make: Any, tmp_path: Path, *, memory_mapped: bool) -> None:
    """They would lead usearch out of its memory."""
    index, _ = make(embeddings(50))
    file = tmp_path / index.graph.name
    content = file.read_bytes()
    for at in (0, len(content) - 40, len(content) - 1):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        file.write_bytes(damaged)
        assert open_graph(tmp_path, index, memory_mapped=memory_mapped) is None
    for other in (content[:-1], b"no graph", None):
        file.write_bytes(other) if other else file.unlink()
        assert open_graph(tmp_path, index, memory_mapped=memory_mapped) is None


def test_the_rows_that_a_graph_proposes_are_checked(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "_BLOCK_ROWS", 1)
    rows = embeddings(900)
    index, graph = make(rows)
    damaged = rows.copy()
    damaged[7, 3] += 0.01
    assert nearest(index, damaged, -rows[7], top=1, graph=graph, checked=False)  # compared with other blocks alone
    with pytest.raises(ConfigError):
        nearest(index, damaged, rows[7], top=1, graph=graph, checked=False)


@pytest.fixture
def many_images(colour_images: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (searching, updating):
        monkeypatch.setattr(module, "GRAPH_FROM", 40)
    for i in range(40):
        Image.new("RGB", (9, 9), (5 * i, 50, 250 - 5 * i)).save(colour_images / f"{i:03}.png")
    return colour_images


def test_an_index_above_the_threshold_gets_a_graph_that_updates_keep(
    colour_bundle: Path, many_images: Path, tmp_path: Path
) -> None:
    encoder, path = load(colour_bundle), tmp_path / "index"
    assert update_index(encoder, many_images, path).approximate
    built = read_index(path)[0].graph
    assert built is not None
    Image.new("RGB", (9, 9), (0, 255, 3)).save(many_images / "new.png")
    (many_images / "003.png").unlink()
    assert update_index(encoder, many_images, path).approximate
    index, _ = read_index(path)
    assert index.graph == built
    assert len(list(path.iterdir())) == 4
    graph = open_graph(path, index)
    assert graph is not None
    assert [index.entries[row].path for row in graph.others] == ["new.png"]
    files = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert update_index(encoder, many_images, path).approximate
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == files
    for query in ("green", "blue", "red"):
        assert search_index(path, query, top=5) == search_index(path, query, top=5, exact=True)
    for i in range(10):
        Image.new("RGB", (9, 9), (7, 11 * i, 200)).save(many_images / f"more{i}.png")
    update_index(encoder, many_images, path)
    assert read_index(path)[0].graph != built
    for file in list(many_images.glob("0*.png")):
        file.unlink()
    assert not update_index(encoder, many_images, path).approximate
    assert {file.name.partition("-")[0] for file in path.iterdir()} == {"index.json", "embeddings"}


@pytest.mark.parametrize("pattern", ["graph-*", "keys-*"])
def test_a_graph_that_cannot_be_used_is_built_again(
    pattern: str, colour_bundle: Path, many_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, path = load(colour_bundle), tmp_path / "index"
    with monkeypatch.context() as missing:
        for module in (searching, updating):
            missing.setattr(module, "usearch_is_installed", lambda: False)
        reporter = Watch()
        assert not update_index(encoder, many_images, path, reporter=reporter).approximate
        assert "search stays exact; with usearch" in reporter.noted[0]
        assert len(search_index(path, "blue", top=3)) == 3
    assert update_index(encoder, many_images, path).approximate  # nothing new but the package
    (file,) = path.glob(pattern)
    file.write_bytes(file.read_bytes()[:100])
    assert open_graph(path, read_index(path)[0]) is None
    assert update_index(encoder, many_images, path).approximate
    assert open_graph(path, read_index(path)[0]) is not None
    assert len(list(path.iterdir())) == 4
