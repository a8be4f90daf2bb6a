"""Index and read data sets of millions of samples: time, memory, and the time to the first batch.

    python -m benchmarks.data.scale -o benchmarks/results/MACHINE/scale.json --readme benchmarks/measurements/scale.md

Four data sets of 15 million samples, each measured in a process of its own at the first start and at a later one:

shards     1,200 tars of 12,500 samples: hard links to one tar, whose images are holes
csv        a table of 15 million rows, which name 100,000 image files 150 times each
parquet    the same rows (needs pyarrow)
store      a teacher's embeddings of 15 million pairs with captions of their own, whose rows are holes; 10,000 random
           ones are read

With `--of`, those that are not named stay as they are in the output, if they were measured on the same day.

They take some 4 GB of disk, and their content comes from the page cache, so that the figures are those of scanning,
looking for images, indexing and reading. Memory is what the process and its workers hold beyond an interpreter that has
imported the package, in proportional set size, so that shared pages count once.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.publishing import add_output_options, here_and_now, publish

CAPTION = "a photograph of something"
IMAGES = 100_000  # files that a table names
STARTS = ("first start", "later start")
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure indexing and reading of millions of samples.")
    add_output_options(parser, "scale")
    parser.add_argument("--shards", type=int, default=1200)
    parser.add_argument("--samples", type=int, default=12_500, help="per shard (default: 12,500)")
    parser.add_argument("--of", nargs="+", choices=list(MAKERS), default=list(MAKERS), help="which data sets")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure = measure_store if arguments.of == ["store"] else measure_pairs
        print(json.dumps(measure(arguments.child)))
        return
    record: dict[str, Any] = {
        **here_and_now(),
        "samples": arguments.shards * arguments.samples,
        "shards": arguments.shards,
    }
    measured = earlier(record, arguments.output)
    for kind in arguments.of:
        measured[kind] = starts(kind, arguments.shards, arguments.samples)
    record["data sets"] = {kind: measured[kind] for kind in MAKERS if kind in measured}
    publish(record, table(record), arguments)


def earlier(record: dict[str, Any], output: Path | None) -> dict[str, Any]:
    """Return the data sets that were measured into `output` on the same day and machine, and are of the same size."""
    if output is None or not output.is_file():
        return {}
    before = json.loads(output.read_text())
    return dict(before["data sets"]) if all(before[key] == record[key] for key in record) else {}


def starts(kind: str, shards: int, samples: int) -> dict[str, Figures]:
    """Make a data set, and return the figures of two processes that open it one after another."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        MAKERS[kind](folder, shards, samples)
        environment = {**os.environ, "CLIP_RD_EDGE_CACHE": str(folder / "cache")}
        command = [sys.executable, "-m", "benchmarks.data.scale", "--child", name, "--of", kind]
        return {
            start: json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
            for start in STARTS
        }


def table(record: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    rows = [
        "| data set | start | processor time to index | wall time to the first batch | memory |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for kind, figures in record["data sets"].items():
        rows += [
            f"| {kind} | {start.removesuffix(' start')} | {f['opening_cpu_seconds']:.3g} s | "
            f"{f['first_batch_seconds']:.3g} s | {f['memory_mb']:.0f} MB |"
            for start, f in figures.items()
        ]
    return "\n".join([*rows, "", f"{record['samples']:,} samples; {record['machine']}, {record['date']}."])


def write_shards(folder: Path, shards: int, samples: int) -> None:
    """Write one tar with holes for images of 20 to 40 KB, and hard links to it."""
    sizes = np.random.default_rng(0).integers(20_000, 40_000, samples).tolist()
    with (folder / "00000.tar").open("wb") as file:
        for i, size in enumerate(sizes):
            for suffix, content_size in (("jpg", size), ("txt", len(CAPTION))):
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = content_size
                file.write(info.tobuf(tarfile.USTAR_FORMAT))
                start = file.tell()
                if suffix == "txt":
                    file.write(CAPTION.encode())
                file.seek(start + -(-content_size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        file.write(bytes(2 * tarfile.BLOCKSIZE))
    for shard in range(1, shards):
        os.link(folder / "00000.tar", folder / f"{shard:05d}.tar")
    (folder / "source").write_text(f"{folder}/{{00000..{shards - 1:05d}}}.tar")


def table_rows(folder: Path, count: int) -> Iterator[tuple[str, str]]:
    """Write empty image files, and yield rows that name them by their paths in the table's folder."""
    names = [f"images/{i // 1000:03d}/{i:09d}.jpg" for i in range(min(IMAGES, count))]
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for i in range(count):
        yield names[i % len(names)], CAPTION


def write_csv(folder: Path, shards: int, samples: int) -> None:
    """Write a CSV."""
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title")])
        csv.writer(file).writerows(table_rows(folder, shards * samples))
    (folder / "source").write_text(str(folder / "pairs.csv"))


def write_parquet(folder: Path, shards: int, samples: int) -> None:
    """Write a Parquet file, one row group per shard."""
    import pyarrow
    import pyarrow.parquet

    rows = table_rows(folder, shards * samples)
    schema = pyarrow.schema([("filepath", pyarrow.string()), ("title", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(folder / "pairs.parquet", schema) as writer:
        for _ in range(shards):
            names, captions = zip(*(next(rows) for _ in range(samples)), strict=True)
            writer.write_table(pyarrow.table({"filepath": names, "title": captions}, schema=schema))
    (folder / "source").write_text(str(folder / "pairs.parquet"))


def write_store(folder: Path, shards: int, samples: int) -> None:
    """Write a complete teacher's store whose shards are hard links to one of zeros."""
    import msgspec

    from clip_rd_edge.bundle.preprocess import Preprocessing
    from clip_rd_edge.distillation import store
    from clip_rd_edge.distillation.pixels import Crops

    pairs = shards * samples
    manifest = store.StoreManifest(
        teacher="synthetic",
        teacher_sha256="",
        logit_scale=100.0,
        embedding_size=512,
        preprocessing=Preprocessing(size=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        crops=Crops(scale=(0.9, 1.0)),
        seed=0,
        views=1,
        data="synthetic",
        pairs=pairs,
        pairs_sha256="",
        precision="fp32",
    )
    linked: dict[int, Path] = {}  # by number of rows
    for shard, rows in enumerate(map(len, store.shards(pairs))):
        for path in (store.image_shard(folder, 0, shard), store.text_shard(folder, shard)):
            if rows in linked:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.hardlink_to(linked[rows])
            else:
                store.write_rows(path, np.zeros((rows, manifest.embedding_size), np.float16))
                linked[rows] = path
    store.write_rows(store.keys_file(folder), np.arange(pairs, dtype=np.uint64)[:, None] * np.uint64(2**64 // pairs))
    (folder / store.MANIFEST).write_bytes(msgspec.json.encode(manifest))
    (folder / store.COMPLETE).write_bytes(msgspec.json.encode(store.CompleteStore(pairs)))


MAKERS: dict[str, Callable[[Path, int, int], None]] = {
    "shards": write_shards,
    "csv": write_csv,
    "parquet": write_parquet,
    "store": write_store,
}


def measure_pairs(folder: Path) -> Figures:
    """Load pairs, and read the locations and captions of a first batch."""
    from clip_rd_edge.data.load import load_pairs
    from clip_rd_edge.data.order import EpochOrder
    from clip_rd_edge.data.samples import fingerprint
    from clip_rd_edge.utils.text import Reporter

    before, peak, next_look = proportional_memory(), 0, 0.0

    class Watch(Reporter):
        def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
            nonlocal peak, next_look
            if time.monotonic() > next_look:
                peak, next_look = max(peak, proportional_memory()), time.monotonic() + 2

    started, cpu = time.perf_counter(), cpu_seconds()
    pairs = load_pairs((folder / "source").read_text(), reporter=Watch())
    opened, opening_cpu = time.perf_counter(), cpu_seconds() - cpu
    order = EpochOrder(pairs.groups, seed=0)
    batch = order.indices(0, 0, min(1024, len(pairs))).tolist()
    captions = [pairs.read(index).captions for index in batch]
    first_batch = time.perf_counter()
    assert set(captions) == {(CAPTION,)}
    for step in range(20):
        order.indices(0, start := step * len(pairs) // 20, min(start + 1024, len(pairs)))
    peak = max(peak, proportional_memory())
    fingerprint(pairs)
    return {
        "samples": len(pairs),
        "opening_seconds": opened - started,
        "opening_cpu_seconds": opening_cpu,
        "first_batch_seconds": first_batch - started,
        "fingerprint_seconds": time.perf_counter() - first_batch,
        "memory_mb": (peak - before) / 1e6,
    }


def measure_store(folder: Path) -> Figures:
    """Open a teacher's store, and read 10,000 random rows of images and texts."""
    from clip_rd_edge.distillation import store

    generator = np.random.default_rng(0)
    before = proportional_memory()
    started, cpu = time.perf_counter(), cpu_seconds()
    cache = store.open_store(folder)
    opened, opening_cpu = time.perf_counter(), cpu_seconds() - cpu
    for count, index in enumerate(generator.integers(0, cache.manifest.pairs, 10_000).tolist()):
        cache.lookup(0, index, f"caption {index}")
        if count == 1023:
            first_batch = time.perf_counter()
    return {
        "samples": cache.manifest.pairs,
        "opening_seconds": opened - started,
        "opening_cpu_seconds": opening_cpu,
        "first_batch_seconds": first_batch - started,
        "rows_seconds": time.perf_counter() - opened,
        "memory_mb": (proportional_memory() - before) / 1e6,
    }


def cpu_seconds() -> float:
    """Return the processor time of this process and its finished children."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def proportional_memory() -> int:
    """Return the proportional set size of this process and its children in bytes."""
    process = os.getpid()
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    total = 0
    for pid in (process, *children):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has ended
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


if __name__ == "__main__":
    main()
