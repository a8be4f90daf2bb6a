"""Measure how long `search` takes to open an index and to find the nearest images, by number of images.

With --graph, the graph that `index` builds from a million images on is measured as well, and what it misses: of queries
like images, and of those like texts, which are far from all images. Besides latencies, the processor time of a query is
shown, which other programs on the machine affect little. Memory is the peak of a process that opens the index and
answers a query; most of it is the rows and the graph, mapped from their files.

python -m benchmarks.devices.search 10000 100000 1000000
python -m benchmarks.devices.search 1000000 --graph --threads 2 -o benchmarks/results/MACHINE/search.json \\
    --readme benchmarks/measurements/processes.md       # pip install usearch; minutes
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.publishing import add_output_options, here_and_now, publish
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.bundle.encoder import Embeddings, normalise
from clip_rd_edge.runtime import index as searching
from clip_rd_edge.runtime.index import (
    Entry,
    Index,
    nearest,
    open_graph,
    read_index,
    write_index,
)
from clip_rd_edge.runtime.search_graph import build_graph

TOP, QUERIES = 10, 100

# Opens an index, answers one query with the graph or without, and prints the peak of its memory in MB.
WORKER = """
import resource, sys
from pathlib import Path
from clip_rd_edge.runtime.index import nearest, open_graph, read_index
path = Path(sys.argv[1])
index, rows = read_index(path)
nearest(index, rows, rows[0], top=10, graph=open_graph(path, index) if sys.argv[2] == "graph" else None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
"""


class Queries(msgspec.Struct, frozen=True, kw_only=True):
    """Median, lowest and highest latency of a query, and its processor time, in ms; memory in MB."""

    ms: float
    min_ms: float
    max_ms: float
    core_ms: float
    memory_mb: float


class GraphFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A graph: how long building it took, its file, and its queries.

    Attributes:
        recall: share of the exact TOP nearest that it finds, on average over queries like images and the lowest.
        text_recall: the same of queries like texts.
    """

    build_s: float
    build_core_s: float
    threads: int
    size_mb: float
    open_ms: float
    queries: Queries
    recall: tuple[float, float]
    text_recall: tuple[float, float]


class Searched(msgspec.Struct, frozen=True, kw_only=True):
    """An index of a number of images: opening it, and its queries."""

    images: int
    size: int
    open_ms: float
    exact: Queries
    graph: GraphFigures | None = None


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """The content of search.json."""

    machine: str
    date: str
    rows: tuple[Searched, ...]


def make_centres(size: int) -> Embeddings:
    """Return the directions of 2,000 subjects."""
    return np.random.default_rng(0).standard_normal((2_000, size)).astype(np.float32)


def make_texts(count: int, size: int) -> Embeddings:
    """Return embeddings like texts: those of images of their subject are the nearest, with cosines of 0.3 to 0.4."""
    centres, rng = make_centres(size), np.random.default_rng(2)
    noise = rng.standard_normal((count, size), dtype=np.float32)
    return normalise(0.25 * centres[rng.integers(0, len(centres), count)] + noise)


def make_rows(count: int, size: int, *, seed: int = 0) -> Embeddings:
    """Return embeddings around the subjects, like their images: uniform ones would have no near neighbours."""
    centres, rng = make_centres(size), np.random.default_rng(seed)
    rows = np.empty((count, size), dtype=np.float32)
    for start in range(0, count, 50_000):
        part = rows[start : start + 50_000]
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        part[:] = normalise(centres[rng.integers(0, len(centres), len(part))] + 0.7 * noise)
    return rows


def make_index(path: Path, rows: Embeddings) -> None:
    """Write an index of images that do not exist."""
    entries = [
        Entry(
            path=f"2026/11/IMG_{i:08}.jpg",
            size_bytes=3_000_000 + i,
            modified_ns=10**18 + i,
            changed_ns=10**18 + i,
            sha256=f"{i:064x}",
        )
        for i in range(len(rows))
    ]
    index = Index(folder="/photos", bundle="/bundle", model="0" * 64, embeddings="", entries=entries)
    write_index(path, index, rows)


def elapsed_ms(start: float) -> float:
    """Return the milliseconds since `start`."""
    return (time.perf_counter() - start) * 1e3


def time_queries(path: Path, way: str, call: Callable[[Embeddings], object], queries: Embeddings) -> Queries:
    """Time queries, after one untimed query that reads the rows from disk; `way` is exact or graph."""
    call(queries[0])
    latencies_ms, core_ms = [], []
    for query in queries:
        start, start_cpu = time.perf_counter(), time.process_time()
        call(query)
        core_ms.append((time.process_time() - start_cpu) * 1e3)
        latencies_ms.append(elapsed_ms(start))
    done = subprocess.run([sys.executable, "-c", WORKER, path, way], capture_output=True, text=True, check=True)
    return Queries(
        ms=float(np.median(latencies_ms)),
        min_ms=min(latencies_ms),
        max_ms=max(latencies_ms),
        core_ms=float(np.median(core_ms)),
        memory_mb=float(done.stdout),
    )


def measure_graph(path: Path, queries: Embeddings, threads: int) -> GraphFigures:
    """Build the graph of an index and compare it with exact search."""
    index, rows = read_index(path)
    start, start_cpu = time.perf_counter(), time.process_time()
    built = build_graph(path, rows, threads=threads)
    assert built is not None
    build_s, core_s = time.perf_counter() - start, time.process_time() - start_cpu
    index = write_index(path, msgspec.structs.replace(index, graph=built), rows)
    index, rows = read_index(path)
    start = time.perf_counter()
    graph = open_graph(path, index)
    open_ms = elapsed_ms(start)
    assert graph is not None

    def recall(queries: Embeddings) -> tuple[float, float]:
        shares = []
        for query in queries:
            exact, found = ({hit.path for hit in nearest(index, rows, query, top=TOP, graph=g)} for g in (None, graph))
            shares.append(len(found & exact) / TOP)
        return float(np.mean(shares)), min(shares)

    return GraphFigures(
        build_s=build_s,
        build_core_s=core_s,
        threads=threads,
        size_mb=(path / built.name).stat().st_size / 1e6,
        open_ms=open_ms,
        queries=time_queries(path, "graph", lambda query: nearest(index, rows, query, top=TOP, graph=graph), queries),
        recall=recall(queries),
        text_recall=recall(make_texts(QUERIES, rows.shape[1])),
    )


def measure(count: int, size: int, *, graph: bool, threads: int) -> Searched:
    """Measure an index of `count` generated embeddings (count, size)."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "index"
        make_index(path, make_rows(count, size))
        start = time.perf_counter()
        index, rows = read_index(path)
        open_ms = elapsed_ms(start)
        queries = make_rows(QUERIES, size, seed=1)
        exact = time_queries(path, "exact", lambda query: nearest(index, rows, query, top=TOP), queries)
        figures = measure_graph(path, queries, threads) if graph else None
    return Searched(images=count, size=size, open_ms=open_ms, exact=exact, graph=figures)


def table(results: Results) -> str:
    """Return the rows as Markdown: one line for exact search, one for that by a graph."""
    recalls = [f"recall of {TOP}, images as queries", "texts as queries"]
    header = ["images", "search", "open, ms", "query, ms", "ms of a core", "memory, MB", *recalls, "built"]
    lines = [header]
    for row in results.rows:
        images = f"{row.images:,} × {row.size}"
        lines.append([images, "exact", f"{row.open_ms:.0f}", *_cells(row.exact), "100%", "100%", "–"])
        if graph := row.graph:
            shares = [f"{100 * mean:.1f}% (lowest {100 * low:.0f}%)" for mean, low in (graph.recall, graph.text_recall)]
            threads = f"{graph.threads} thread{'s' if graph.threads > 1 else ''}"
            built = f"{graph.build_s:.0f} s by {threads}, {graph.build_core_s:.0f} s of a core, {graph.size_mb:.0f} MB"
            opened = f"{row.open_ms:.0f} + {graph.open_ms:.0f}"
            lines.append([images, "graph", opened, *_cells(graph.queries), *shares, built])
    return f"{results.machine}, {results.date}:\n\n{markdown_table(lines, left=(0, 1, 6, 7, 8))}"


def _cells(queries: Queries) -> list[str]:
    latency = f"{queries.ms:.2f} ({queries.min_ms:.2f} to {queries.max_ms:.2f})"
    return [latency, f"{queries.core_ms:.2f}", f"{queries.memory_mb:,.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=int, nargs="+", help="numbers of images")
    parser.add_argument("--size", type=int, default=256, help="embedding size")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="threads that build the graph")
    add_output_options(parser, "search")
    args = parser.parse_args()
    searching.GRAPH_FROM = 0  # a graph is kept, however few the images are
    results = Results(**here_and_now(), rows=())
    for count in args.images:
        row = measure(count, args.size, graph=args.graph, threads=args.threads)
        results = msgspec.structs.replace(results, rows=(*results.rows, row))
        publish(results, table(results), args)


if __name__ == "__main__":
    main()
