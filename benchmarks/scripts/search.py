"""Not a test: how long `search` takes to open an index and to find the nearest, by the number of pictures; with
usearch installed, the same by its graph (HNSW, float16), and what building that graph costs.

python benchmarks/scripts/search.py 10000 100000 1000000
python benchmarks/scripts/search.py 100000 --graph          # pip install usearch; minutes
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from clip_rd_edge.contract.encoder import Embeddings, normalise
from clip_rd_edge.runtime.index import INDEX_VERSION, Entry, Index, nearest, read_index, write_index

TOP, QUERIES = 10, 20


def make_rows(count: int, size: int, *, seed: int = 0) -> Embeddings:
    """Embeddings around 2,000 centres, as pictures have subjects; evenly spread ones would have no nearest."""
    centres = np.random.default_rng(0).standard_normal((2_000, size)).astype(np.float32)
    rng = np.random.default_rng(seed)
    rows = np.empty((count, size), dtype=np.float32)
    for start in range(0, count, 50_000):
        part = rows[start : start + 50_000]
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        part[:] = normalise(centres[rng.integers(0, len(centres), len(part))] + 0.7 * noise)
    return rows


def make_index(path: Path, rows: Embeddings) -> None:
    """An index of pictures that are not there."""
    entries = [
        Entry(path=f"2026/11/IMG_{i:08}.jpg", size_bytes=3_000_000 + i, modified_ns=10**18 + i, sha256=f"{i:064x}")
        for i in range(len(rows))
    ]
    index = Index(
        version=INDEX_VERSION, folder="/photos", bundle="/bundle", model="0" * 64, embeddings="", entries=entries
    )
    write_index(path, index, rows)


def milliseconds(call: Callable[[Embeddings], object], queries: Embeddings) -> Sequence[float]:
    """How long each query takes; the first, which reads the rows from disk, is left out."""
    call(queries[0])
    taken = []
    for query in queries:
        began = time.perf_counter()
        call(query)
        taken.append((time.perf_counter() - began) * 1e3)
    return sorted(taken)


def measure_graph(rows: Embeddings, queries: Embeddings, expected: list[list[int]], path: Path, threads: int) -> str:
    """A graph of the same rows: what it costs to build, what a query takes, and how many of the nearest it finds."""
    from usearch.index import Index as Graph

    graph = Graph(ndim=rows.shape[1], metric="ip", dtype="f16")
    began = time.perf_counter()
    graph.add(np.arange(len(rows)), rows, threads=threads)
    built = time.perf_counter() - began
    graph.save(str(path))
    graph = Graph.restore(str(path), view=True)
    taken = milliseconds(lambda query: graph.search(query, TOP), queries)
    found = [set(graph.search(query, TOP).keys.tolist()) for query in queries]
    recall = np.mean([len(each & set(right)) / TOP for each, right in zip(found, expected, strict=True)])
    return f"graph: built in {built:.0f} s, a query {taken[len(taken) // 2]:.2f} ms, {recall:.1%} of the nearest found"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pictures", type=int, nargs="+")
    parser.add_argument("--size", type=int, default=256, help="numbers an embedding")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="that build the graph")
    given = parser.parse_args()
    for count in given.pictures:
        with tempfile.TemporaryDirectory() as name:
            make_index(Path(name) / "index", make_rows(count, given.size))
            began = time.perf_counter()
            index, rows = read_index(Path(name) / "index")
            opened = (time.perf_counter() - began) * 1e3
            queries = make_rows(QUERIES, given.size, seed=1)
            taken = milliseconds(lambda query: nearest(index, rows, query, top=TOP), queries)  # noqa: B023
            line = f"{count:,} pictures × {given.size}: opened in {opened:.0f} ms, a query {taken[QUERIES // 2]:.1f} ms"
            print(f"{line} ({taken[0]:.1f} to {taken[-1]:.1f})")
            if given.graph:
                expected = [np.argsort(-(rows @ query))[:TOP].tolist() for query in queries]
                print(measure_graph(np.asarray(rows), queries, expected, Path(name) / "graph", given.threads))


if __name__ == "__main__":
    main()
