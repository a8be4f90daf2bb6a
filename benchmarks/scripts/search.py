"""Measure how long `search` takes to open an index and to find the nearest images, by number of images.

With --graph, the graph that `index` builds from a million images on is measured as well, and what it misses. Besides
latencies, the processor time of a query is shown, which other programs on the machine affect little.

python benchmarks/scripts/search.py 10000 100000 1000000
python benchmarks/scripts/search.py 1000000 --graph         # pip install usearch; minutes
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from clip_rd_edge.contract.encoder import Embeddings, normalise
from clip_rd_edge.runtime.index import INDEX_VERSION, Entry, Index, nearest, read_index, write_index
from clip_rd_edge.runtime.index_graph import build_graph, open_graph, write_graph

TOP, QUERIES = 10, 100


def make_rows(count: int, size: int, *, seed: int = 0) -> Embeddings:
    """Return embeddings around 2,000 centres, like images of subjects: uniform ones would have no near neighbours."""
    centres = np.random.default_rng(0).standard_normal((2_000, size)).astype(np.float32)
    rng = np.random.default_rng(seed)
    rows = np.empty((count, size), dtype=np.float32)
    for start in range(0, count, 50_000):
        part = rows[start : start + 50_000]
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        part[:] = normalise(centres[rng.integers(0, len(centres), len(part))] + 0.7 * noise)
    return rows


def make_index(path: Path, rows: Embeddings) -> None:
    """Write an index of images that do not exist."""
    entries = [
        Entry(path=f"2026/11/IMG_{i:08}.jpg", size_bytes=3_000_000 + i, modified_ns=10**18 + i, sha256=f"{i:064x}")
        for i in range(len(rows))
    ]
    index = Index(
        version=INDEX_VERSION, folder="/photos", bundle="/bundle", model="0" * 64, embeddings="", entries=entries
    )
    write_index(path, index, rows)


def describe_queries(call: Callable[[Embeddings], object], queries: Embeddings) -> str:
    """Describe latency and processor time of the queries, after one untimed query that reads the rows from disk."""
    call(queries[0])
    latencies_ms, core_ms = [], []
    for query in queries:
        start, start_cpu = time.perf_counter(), time.process_time()
        call(query)
        core_ms.append((time.process_time() - start_cpu) * 1e3)
        latencies_ms.append((time.perf_counter() - start) * 1e3)
    return (
        f"{np.median(latencies_ms):.2f} ms per query ({min(latencies_ms):.2f} to {max(latencies_ms):.2f}), "
        f"{np.median(core_ms):.2f} ms of a core"
    )


def measure_graph(path: Path, queries: Embeddings, threads: int) -> str:
    """Describe the graph of an index: build time, time per query, and recall of the exact nearest neighbours."""
    index, rows = read_index(path)
    start, start_cpu = time.perf_counter(), time.process_time()
    files = write_graph(path, build_graph(rows, threads=threads))
    build_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    size_mb = (path / files.file).stat().st_size / 1e6
    start = time.perf_counter()
    graph = open_graph(path, files, len(rows))
    assert graph is not None
    open_ms = (time.perf_counter() - start) * 1e3
    queries_text = describe_queries(lambda query: nearest(index, rows, query, top=TOP, graph=graph), queries)
    found = [{hit.path for hit in nearest(index, rows, query, top=TOP, graph=graph)} for query in queries]
    exact = [{hit.path for hit in nearest(index, rows, query, top=TOP)} for query in queries]
    recall = np.mean([len(some & all_) / TOP for some, all_ in zip(found, exact, strict=True)])
    return (
        f"graph of {size_mb:.0f} MB: built in {build_s:.0f} s ({cpu_s:.0f} s of a core), opened in {open_ms:.0f} ms, "
        f"{queries_text}, recall {recall:.1%} of the nearest {TOP}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=int, nargs="+", help="numbers of images")
    parser.add_argument("--size", type=int, default=256, help="embedding size")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="threads that build the graph")
    args = parser.parse_args()
    for count in args.images:
        with tempfile.TemporaryDirectory() as name:
            make_index(Path(name) / "index", make_rows(count, args.size))
            start = time.perf_counter()
            index, rows = read_index(Path(name) / "index")
            open_ms = (time.perf_counter() - start) * 1e3
            queries = make_rows(QUERIES, args.size, seed=1)
            query_ms = describe_queries(lambda query: nearest(index, rows, query, top=TOP), queries)  # noqa: B023
            print(f"{count:,} images × {args.size}: opened in {open_ms:.0f} ms, {query_ms}", flush=True)
            if args.graph:
                print(measure_graph(Path(name) / "index", queries, args.threads), flush=True)


if __name__ == "__main__":
    main()
