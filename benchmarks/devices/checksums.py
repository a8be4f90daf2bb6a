"""Measure what checking a bundle's checksums costs: the first use of a file, and every later one.

python -m benchmarks.devices.checksums              # a file of 100 MB
python -m benchmarks.devices.checksums bundle       # the files of a bundle
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from clip_rd_edge.bundle import manifest as intact
from clip_rd_edge.bundle.manifest import read_manifest
from clip_rd_edge.utils.files import sha256_of

RUNS = 5


def median_ms(run: Callable[[], object]) -> float:
    """Return the median time of RUNS calls, in milliseconds."""
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def main() -> None:
    """Print both times."""
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            os.environ["CLIP_RD_EDGE_CACHE"] = f"{folder}/cache"
            bundle = Path(sys.argv[1])
            manifest = read_manifest(bundle)
            size = sum((bundle / name).stat().st_size for name in manifest.files)
            first = median_ms(lambda: [sha256_of(bundle / name) for name in manifest.files])

            def require_all() -> None:
                for name in manifest.files:
                    intact.require_intact(bundle, manifest, name)

            require_all()
            later = median_ms(require_all)
            print(f"{size / 1e6:.0f} MB in {len(manifest.files)} files: {first:.0f} ms once, {later:.2f} ms afterwards")
            return
        path = Path(folder) / "file"
        path.write_bytes(os.urandom(100_000_000))
        print(f"100 MB: {median_ms(lambda: sha256_of(path)):.0f} ms once")


if __name__ == "__main__":
    main()
