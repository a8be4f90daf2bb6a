"""Index and read a data set of millions of samples in shards: time, memory, and the time to the first batch.

    python benchmarks/scripts/scale.py -o benchmarks/results/<machine>/scale.json     # 1,200 shards of 12,500 samples

The shards are hard links to one tar, whose images are holes: it takes some 100 MB of disk. So the figures are those of
scanning, indexing and reading locations, and the tar's headers come from the page cache. Memory is what the process and
its workers hold beyond an interpreter that has imported the package, in proportional set size, so that shared pages
count once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

CAPTION = b"a photograph of something"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure indexing and reading of many shards.")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--shards", type=int, default=1200)
    parser.add_argument("--samples", type=int, default=12_500, help="per shard (default: 12,500)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, arguments.shards, arguments.samples)
        environment = {**os.environ, "CLIP_RD_EDGE_CACHE": str(folder / "cache")}
        command = [sys.executable, __file__, "--child", str(folder), "--shards", str(arguments.shards)]
        results = {
            key: json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
            for key in ("first start", "later start")
        }
    for key, figures in results.items():
        print(key, *(f"{name}: {value:,.2f}" for name, value in figures.items()), sep="\n    ")
    if arguments.output:
        from clip_rd_edge.utils.host import machine_name

        record = {"date": date.today().isoformat(), "machine": machine_name(), "shards": arguments.shards}
        arguments.output.write_text(json.dumps({**record, "samples": arguments.samples, **results}, indent=2) + "\n")


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
                    file.write(CAPTION)
                file.seek(start + -(-content_size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        file.write(bytes(2 * tarfile.BLOCKSIZE))
    for shard in range(1, shards):
        os.link(folder / "00000.tar", folder / f"{shard:05d}.tar")


def measure(folder: Path) -> dict[str, float]:
    """Load the pairs of a folder of shards and read the locations and captions of a first batch."""
    from clip_rd_edge.data.order import EpochOrder
    from clip_rd_edge.data.pairs import fingerprint, load_pairs
    from clip_rd_edge.utils.reporting import Reporter

    last = len(list(folder.glob("*.tar"))) - 1
    before, peak = proportional_memory(), 0

    class Watch(Reporter):
        def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
            nonlocal peak
            if step % 100 == 50:
                peak = max(peak, proportional_memory())

    started, cpu = time.perf_counter(), cpu_seconds()
    pairs = load_pairs(f"{folder}/{{00000..{last:05d}}}.tar", reporter=Watch())
    indexed = time.perf_counter()
    indexing_cpu = cpu_seconds() - cpu
    order = EpochOrder(pairs.groups, seed=0)
    batch = order.indices(0, 0, 1024).tolist()
    captions = [pairs.captions(index) for index in batch]
    first_batch = time.perf_counter()
    assert set(captions) == {(CAPTION.decode(),)}
    for step in range(20):
        order.indices(0, step * len(pairs) // 20, step * len(pairs) // 20 + 1024)
    peak = max(peak, proportional_memory())
    fingerprint(pairs)
    return {
        "pairs": len(pairs),
        "indexing_seconds": indexed - started,
        "indexing_cpu_seconds": indexing_cpu,
        "first_batch_seconds": first_batch - started,
        "fingerprint_seconds": time.perf_counter() - first_batch,
        "memory_mb": (peak - before) / 1e6,
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
