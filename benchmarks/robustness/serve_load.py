"""Load `clip-rd-edge serve` with concurrent clients, and compare its throughput with that of the model alone.

python -m benchmarks.robustness.serve_load quickstart/bundles/fp32 --seconds 300
python -m benchmarks.robustness.serve_load resnet18 --seconds 90 --json benchmarks/results/MACHINE/serve.json

Clients send one image each, or one text, in llama.cpp's form, and the next one when the answer is there. Beside them,
slow clients never finish their request, and others close the connection before the answer. The model alone runs the
same number of threads on tensors in memory, in batches of the server's size, in turn with the server. A preset in place
of a bundle stands for a student with random weights, which is as fast as a trained one.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.publishing import here_and_now, print_record
from clip_rd_edge.bundle.manifest import is_bundle
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.load import load

MAX_BATCH = 16
ROUNDS = 3
SLOW = 4  # clients that never finish their request
IMAGES = 32  # different images and texts


def random_bundle(student: str, folder: Path) -> Path:
    """Export a student with random weights; needs the extra [train]."""
    from clip_rd_edge.exporting.bundle import export_bundle
    from clip_rd_edge.exporting.plan import Plan
    from clip_rd_edge.models.students import build_student, student_config

    clip = build_student(student_config(student, embedding_size=256), name=student)
    export_bundle(clip, folder / "bundle", Plan())
    return folder / "bundle"


def jpegs(edge: int) -> list[bytes]:
    """Return noise of different brightness, blurred as a photograph is, as JPEG files."""
    rng = np.random.default_rng(0)
    files = []
    for level in np.linspace(40, 215, IMAGES):
        pixels = (level + 40 * rng.standard_normal((edge // 8, edge // 8, 3))).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((edge, edge), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
        files.append(buffer.getvalue())
    return files


def requests_of(kind: str, edge: int) -> list[bytes]:
    """Return the bytes of one request per image or text."""
    if kind == "text":
        items: list[Any] = [{"prompt_string": f"a photo of {i} dogs"} for i in range(IMAGES)]
    else:
        encoded = [base64.b64encode(file).decode() for file in jpegs(edge)]
        items = [{"prompt_string": "<__media__>\n", "multimodal_data": [image]} for image in encoded]
    bodies = [json.dumps({"content": [item]}).encode() for item in items]
    head = "POST /embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
    return [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]


async def client(port: int, requests: list[bytes], until: float, counts: dict[int, int], times: list[float]) -> None:
    """Send one request after the other until the time is over."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    number = 0
    while time.perf_counter() < until:
        started = time.perf_counter()
        writer.write(requests[number % len(requests)])
        number += 1
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])  # type: ignore[index]
        await reader.readexactly(length)
        status = int(head.split(b" ", 2)[1])
        counts[status] = counts.get(status, 0) + 1
        times.append(time.perf_counter() - started)
        if status == 503:
            await asyncio.sleep(1)  # Retry-After
    writer.close()


async def slow_client(port: int, request: bytes, until: float) -> None:
    """Send a request but for its last bytes, and wait."""
    while time.perf_counter() < until:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request[:-20])
        await asyncio.sleep(max(0.0, min(5.0, until - time.perf_counter())))
        writer.close()


async def leaving_client(port: int, request: bytes, until: float) -> None:
    """Close the connection before the answer, again and again."""
    while time.perf_counter() < until:
        with suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            await writer.drain()
            writer.transport.abort()
        await asyncio.sleep(0.5)


async def load_server(port: int, requests: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Return the counts of the answers by status, the rate, and the latencies of one round."""
    counts: dict[int, int] = {}
    times: list[float] = []
    started = time.perf_counter()
    until = started + seconds
    await asyncio.gather(
        *(client(port, requests[i:] + requests[:i], until, counts, times) for i in range(clients)),
        *(slow_client(port, requests[0], until) for _ in range(SLOW)),
        leaving_client(port, requests[0], until),
    )
    return {"counts": counts, "rate": counts.get(200, 0) / (time.perf_counter() - started), "times": times}


def bare_rate(encoder: BundleEncoder, kind: str, seconds: float) -> float:
    """Return how many tensors in memory the tower embeds per second, in batches of MAX_BATCH."""
    height, width = encoder.manifest.preprocessing.size
    encode: Callable[[Any], Any] = encoder.encode_pixels
    inputs: Any = np.random.default_rng(0).standard_normal((MAX_BATCH, 3, height, width)).astype(np.float32)
    if kind == "text":
        encode, inputs = encoder.encode_ids, encoder.tokenize(["a photo of 12 dogs"] * MAX_BATCH)
    count, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        encode(inputs)
        count += MAX_BATCH
    return count / (time.perf_counter() - started)


def metric(port: int, name: str) -> float:
    """Return the value of a metric without labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text = response.read().decode()
    return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]


def measure(bundle: Path, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a server did for one kind of request, beside the model alone."""
    requests = requests_of(kind, options.edge)
    encoder = load(bundle, threads=options.threads, device="cpu")
    bare_rate(encoder, kind, 1)
    command = [sys.executable, "-m", "clip_rd_edge", "serve", str(bundle), "--port", "0", "--device", "cpu"]
    command += ["--threads", str(options.threads), "--max-batch", str(MAX_BATCH)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().strip().rstrip("/").rsplit(":", 1)[1])
        asyncio.run(load_server(port, requests, options.clients, 5))  # until its memory has its size
        memory = [metric(port, "process_resident_memory_bytes") / 1e6]
        bare, rounds = [], []
        for _ in range(ROUNDS):
            bare.append(bare_rate(encoder, kind, 5))
            rounds.append(asyncio.run(load_server(port, requests, options.clients, options.seconds / ROUNDS)))
            memory.append(metric(port, "process_resident_memory_bytes") / 1e6)
        server.terminate()
        code = server.wait(20)
    counts: dict[int, int] = {}
    for part in rounds:
        for status, count in part["counts"].items():
            counts[status] = counts.get(status, 0) + count
    times = sorted(1e3 * seconds for part in rounds for seconds in part["times"])
    rate, alone = statistics.median(part["rate"] for part in rounds), statistics.median(bare)
    return {
        "kind": kind,
        "answers": {str(status): count for status, count in sorted(counts.items())},
        "per_second": round(rate, 1),
        "alone_per_second": round(alone, 1),
        "ratio": round(statistics.median(p["rate"] / b for p, b in zip(rounds, bare, strict=True)), 3),
        "latency_ms_p50": round(times[len(times) // 2], 1),
        "latency_ms_p99": round(times[int(len(times) * 0.99)], 1),
        "memory_mb": [round(value, 1) for value in memory],
        "exit_code": code,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a bundle, or a preset for a student with random weights")
    parser.add_argument("--seconds", type=float, default=300, help="of load, for each kind of request")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="threads of the model")
    parser.add_argument("--edge", type=int, default=176, help="of the JPEG images, in pixels")
    parser.add_argument("--kind", choices=["image", "text"], action="append", help="default: both")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    load_average = os.getloadavg()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(options.bundle)
        if not is_bundle(bundle):
            bundle = random_bundle(options.bundle, Path(scratch))
        name = load(bundle).manifest.name
        results = [measure(bundle, kind, options) for kind in options.kind or ("image", "text")]
    summary = {
        "model": name,
        **here_and_now(),
        "load_average": [round(value, 1) for value in load_average],  # of the machine before the run: its other work
        "seconds": options.seconds,
        "clients": options.clients,
        "threads": options.threads,
        "edge": options.edge,
        "results": results,
    }
    print_record(summary, options.json)


if __name__ == "__main__":
    main()
