"""Compare training batches from an S3 store and a web server, both slow and failing, with those from the local disk.

    pip install 'moto[server]' s3fs
    python -m benchmarks.data.streaming -o benchmarks/results/MACHINE/streaming.json \\
        --readme benchmarks/measurements/streaming.md

The store is moto's S3 server, behind a proxy that delays each request by 20 ms and lets one in a hundred fail (with
503, or with half of the answer); the web server does the same. In each round, all three ways load the same epoch, in
turn, with an empty cache of shards and one loader process, into batches of 64 crops of 224 pixels. Then the store
answers with 503 for a minute in the middle of an epoch, and a run of `distill` on it is killed and resumed.

All batches are compared bit for bit by a digest, and weights by value.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.data.unreliable_server import UnreliableServer
from benchmarks.publishing import add_output_options, here_and_now, publish

SIZE, BATCH, WINDOW_SHARDS = (512, 384), 64, 3
LATENCY_S, FAILING_SHARE, OUTAGE_S = 0.02, 0.01, 60.0
BUCKET = "photographs"


def write_shards(folder: Path, shards: int, samples: int) -> str:
    """Write shards of JPEGs: clouds of colour with the grain of a camera; return their pattern."""
    rng = np.random.default_rng(0)
    photos = []
    for _ in range(64):
        clouds = Image.fromarray(rng.integers(0, 255, (6, 8, 3)).astype(np.uint8)).resize(SIZE)
        pixels = np.asarray(clouds, np.float32) + rng.normal(0, 4, (SIZE[1], SIZE[0], 1))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        photos.append(buffer.getvalue())
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for i in range(samples):
                number = shard * samples + i
                for suffix, content in (("jpg", photos[number % len(photos)]), ("txt", f"photo {number}".encode())):
                    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return f"{{000..{shards - 1:03d}}}.tar"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def s3_store() -> Iterator[str]:
    """Run moto's S3 server in a process of its own; yield its address."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", address.split(":")[1]]
    store = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(address.split(":")[1]))) == 0:
                    break
            time.sleep(0.1)
        yield address
    finally:
        store.kill()
        store.wait()


class ServerProcess:
    """An unreliable server in a process of its own, so that it does not share this one's interpreter lock."""

    def __init__(self, folder: Path = Path(), target: str = "") -> None:
        self._pipe, other = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(
            target=self._serve, args=(folder, target, other), daemon=True
        )
        self._process.start()
        self.url: str = self._pipe.recv()

    @staticmethod
    def _serve(folder: Path, target: str, pipe: Connection) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with UnreliableServer(folder, target=target).running() as server:
            pipe.send(server.url)
            while (message := pipe.recv()) is not None:
                kind, value = message
                if kind == "down":
                    server.down_until = time.monotonic() + value
                elif kind == "slow and failing":
                    server.latency_s, server.failing_share = value
                pipe.send((len(server.requests), server.failed))

    def ask(self, kind: str, value: object = None) -> tuple[int, int]:
        """Change how the server behaves; return the numbers of requests and of failed ones so far."""
        self._pipe.send((kind, value))
        answer: tuple[int, int] = self._pipe.recv()
        return answer

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


class Watcher:
    """Looks at the size of the cache of shards, ten times a second."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.largest, self._stopped = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(0.1):
            total = 0
            for path in self._folder.glob("*") if self._folder.is_dir() else ():
                with contextlib.suppress(OSError):
                    total += path.stat().st_size if path.is_file() else 0
            self.largest = max(self.largest, total)


def load_epoch(source: str, *, outage: ServerProcess | None = None) -> dict[str, Any]:
    """Load an epoch with an empty cache of shards; return its digest, images per second and the longest wait."""
    from clip_rd_edge.bundle.preprocess import Preprocessing
    from clip_rd_edge.data.load import load_pairs
    from clip_rd_edge.data.order import EpochOrder, StepSampler
    from clip_rd_edge.data.shard_files import close_tars
    from clip_rd_edge.distillation.loader import ViewDataset, step_loader
    from clip_rd_edge.distillation.pixels import crops_for
    from clip_rd_edge.utils.paths import cache_home

    pairs = load_pairs(source)
    shutil.rmtree(cache_home() / "remote-shards", ignore_errors=True)
    close_tars()
    preprocessing = Preprocessing(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
    dataset = ViewDataset(pairs, preprocessing, [], crops=crops_for(preprocessing, (0.9, 1.0), "scaled"), seed=0)
    steps = len(pairs) // BATCH
    sampler = StepSampler(pairs.groups, BATCH, seed=0, steps=range(steps), prefetch=pairs.prefetch)
    sampler.order = EpochOrder(pairs.groups, seed=0, window=WINDOW_SHARDS * int(pairs.groups[0]))
    digest, longest = hashlib.sha256(), 0.0
    started = last = time.perf_counter()
    for step, batch in enumerate(step_loader(dataset, sampler, workers=1)):
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        assert not batch.bad
        digest.update(batch.student_pixels.contiguous().numpy().tobytes() + "\n".join(batch.captions).encode())
        if outage and step == 0:
            outage.ask("down", OUTAGE_S)
    seconds = time.perf_counter() - started
    return {"digest": digest.hexdigest(), "images_per_second": steps * BATCH / seconds, "longest_wait_s": longest}


def distil(source: str, run: Path, *, kill_at: str | None = None) -> None:
    """Train a tiny student, and kill the process when a file of the run appears."""
    options = (
        "--recipe clip --student test_vit --image-size 160 --text tiny --context-length 8 --embedding-size 16 "
        "--batch-size 8 --steps 24 --precision fp32 --checkpoint-every 2 --workers 1 --resume"
    )
    command = [sys.executable, "-m", "clip_rd_edge", "distill", "--data", source, *options.split(), "-o", str(run)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    while kill_at and process.poll() is None and not any(run.glob(kill_at)):
        time.sleep(0.001)
    if kill_at:
        assert process.poll() is None, "the run ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert kill_at or process.returncode == 0


def same_weights(first: Path, second: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    one, two = (load_file(run / "student" / "open_clip_model.safetensors") for run in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all figures."""
    shards = folder / "shards"
    shards.mkdir()
    pattern = write_shards(shards, arguments.shards, arguments.samples)
    shard_bytes = (shards / "000.tar").stat().st_size
    limit = (2 * WINDOW_SHARDS + 1) * shard_bytes
    os.environ |= {
        "CLIP_RD_EDGE_CACHE": str(folder / "cache"),
        "CLIP_RD_EDGE_SHARD_CACHE_GB": str(limit / 1e9),
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with s3_store() as address, Watcher(folder / "cache" / "remote-shards") as watcher:
        store, web = ServerProcess(target=address), ServerProcess(shards)
        os.environ["AWS_ENDPOINT_URL"] = store.url
        import s3fs

        bucket = s3fs.S3FileSystem()
        bucket.mkdir(BUCKET)
        for path in sorted(shards.iterdir()):
            bucket.put(str(path), f"{BUCKET}/{path.name}")
        for server in (store, web):
            server.ask("slow and failing", (LATENCY_S, FAILING_SHARE))
        sources = {"disk": f"{shards}/{pattern}", "S3": f"s3://{BUCKET}/{pattern}", "HTTP": f"{web.url}/{pattern}"}
        for source in sources.values():
            load_epoch(source)  # indexes the shards
        rounds = [{way: load_epoch(source) for way, source in sources.items()} for _ in range(arguments.rounds)]
        outage = load_epoch(sources["S3"], outage=store)
        largest = watcher.largest
        os.environ["CLIP_RD_EDGE_SHARD_CACHE_GB"] = "100"  # a run's window holds all of these shards
        local, remote = folder / "local", folder / "remote"
        distil(sources["disk"], local)
        for moment in ("config.yaml", "checkpoints/step-6", "checkpoints/step-14"):
            distil(sources["S3"], remote, kill_at=moment)
        distil(sources["S3"], remote)
        requests = {name: server.ask("count") for name, server in (("S3", store), ("HTTP", web))}
        for server in (store, web):
            server.close()
    digests = {result["digest"] for results in (*rounds, {"outage": outage}) for result in results.values()}
    speeds = {way: [results[way]["images_per_second"] for results in rounds] for way in sources}
    return {
        "shards": arguments.shards,
        "samples": arguments.shards * arguments.samples,
        "shard_bytes": shard_bytes,
        "cache_limit_bytes": limit,
        "largest_cache_bytes": largest,
        "images_per_second": {way: statistics.median(values) for way, values in speeds.items()},
        "ratio_to_disk": {
            way: [r / d for r, d in zip(speeds[way], speeds["disk"], strict=True)] for way in ("S3", "HTTP")
        },
        "batches_are_equal": len(digests) == 1,
        "outage": {"seconds": OUTAGE_S, "longest_wait_s": outage["longest_wait_s"]},
        "requests": {name: {"all": all_, "failed": failed} for name, (all_, failed) in requests.items()},
        "killed_three_times_and_resumed_equals_disk": same_weights(local, remote),
    }


def table(record: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    rows = [
        "| from | images per second | of disk, round by round | requests | of them failed |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, speed in record["images_per_second"].items():
        ratios = record["ratio_to_disk"].get(way)
        span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        count = record["requests"].get(way)
        requests = f"{count['all']:,} | {count['failed']}" if count else " | "
        rows.append(f"| {way} | {speed:.0f} | {span} | {requests} |")
    limit, largest = record["cache_limit_bytes"] / 1e6, record["largest_cache_bytes"] / 1e6
    outage = record["outage"]
    sentences = [
        f"Batches equal bit for bit: {yes(record['batches_are_equal'])}.",
        f"The cache's limit was {limit:.0f} MB, and it held at most {largest:.0f} MB.",
        f"In {outage['seconds']:.0f} s without the store a batch took at most {outage['longest_wait_s']:.0f} s.",
        "A run on S3 that was killed three times and resumed ended with the weights of one on disk: "
        f"{yes(record['killed_three_times_and_resumed_equals_disk'])}.",
        f"{record['samples']:,} images of {SIZE[0]} × {SIZE[1]} pixels in {record['shards']} shards; "
        f"{record['machine']}, {record['date']}.",
    ]
    return "\n".join([*rows, "", *sentences])


def yes(flag: bool) -> str:
    return "yes" if flag else "NO"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare batches from S3 and HTTP with those from disk.")
    add_output_options(parser, "streaming")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--samples", type=int, default=256, help="per shard (default: 256)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        record = {**here_and_now(), **measure(Path(name), arguments)}
    publish(record, table(record), arguments)


if __name__ == "__main__":
    main()
