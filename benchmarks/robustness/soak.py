"""Keep servers and a training run busy for long, with clients and faults as bad as they come, and see what gives.

    python -m benchmarks.robustness.soak servers --seconds 600 -o benchmarks/results/MACHINE/soak-servers.json
    python -m benchmarks.robustness.soak training --seconds 3600 -o benchmarks/results/MACHINE/soak-training.json

`servers` starts `serve` and `demo` side by side. Two good clients each ask for the light answers and for embeddings
(or classifications) in turn; beside them, slow clients never finish their requests, others close the connection before
the answer, and others send what is in tests/corpus/requests. Memory is that of the servers after a tenth of the time,
and at the end. A task that sleeps for a tenth of a second in turn says how long the clients' own process makes them
wait.

`training` runs distill on 240 images with a tiny student, injects a fault each minute, resumes, and compares the
weights with those of a run that was left alone, which goes on beside it. Faults are, in turn: kill -9, SIGTERM, no
space for a checkpoint (a limit on the size of files), one flipped bit in the newest checkpoint, and a checkpoint cut
off. A run that ends is followed by the next one until the time is over, and the last one goes on to its end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.publishing import here_and_now, print_record
from benchmarks.robustness.faults import make_bundle
from benchmarks.robustness.serve_load import leaving_client, requests_of, slow_client

ROOT = Path(__file__).parents[2]
HOSTILE = ROOT / "tests" / "corpus" / "requests"
SLOW, HOSTILE_CLIENTS = 20, 4
WARM_UP = 0.1  # of the time, before memory is measured first


class Waits:
    """Answers of one kind: how many of each status, and how long they took in seconds."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.seconds: list[float] = []

    def figures(self) -> dict[str, Any]:
        """Return the figures to publish."""
        ordered = sorted(self.seconds) or [0.0]
        return {
            "answers": {str(status): count for status, count in sorted(self.statuses.items())},
            "wait_ms_p50": round(1e3 * ordered[len(ordered) // 2], 1),
            "wait_ms_p99": round(1e3 * ordered[int(len(ordered) * 0.99)], 1),
            "wait_ms_max": round(1e3 * ordered[-1], 1),
        }


async def ask(port: int, request: bytes, waits: Waits) -> None:
    """Send one request on a connection of its own and read the whole answer."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        await asyncio.wait_for(reader.readexactly(length), 60)
        waits.statuses[int(head.split(b" ", 2)[1])] += 1
    except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
        waits.statuses[0] += 1
    finally:
        writer.close()
    waits.seconds.append(time.perf_counter() - started)


async def good_client(port: int, requests: Sequence[bytes], waits: Waits, until: float, pause: float) -> None:
    """Ask one thing after the other."""
    number = 0
    while time.perf_counter() < until:
        await ask(port, requests[number % len(requests)], waits)
        number += 1
        await asyncio.sleep(pause)


async def hostile_client(port: int, contents: Sequence[bytes], until: float, seed: int) -> None:
    """Send what no client should, and do not read on."""
    choose = random.Random(seed)
    while time.perf_counter() < until:
        with suppress(OSError, asyncio.TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(choose.choice(contents).replace(b"{port}", str(port).encode()))
            await asyncio.wait_for(reader.read(200), choose.choice((0.05, 1.0)))
            writer.close()
        await asyncio.sleep(0.2)


async def sleeper(delays: list[float], until: float) -> None:
    """Note by how much a sleep of a tenth of a second is too long: what this machine's other work costs anybody."""
    while time.perf_counter() < until:
        started = time.perf_counter()
        await asyncio.sleep(0.1)
        delays.append(time.perf_counter() - started - 0.1)


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def post(path: str, body: bytes) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def load_both(ports: dict[str, int], seconds: float, memory: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Load both servers; return the waits of good clients, and the memory after the warm-up and at the end."""
    until = time.perf_counter() + seconds
    images = requests_of("image", 96)
    picture = (ROOT / "tests" / "corpus" / "good" / "red.png").read_bytes()
    labels = json.dumps(["a cat", "a dog", "a house"]).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", ports["demo"])
    writer.write(post("/api/labels", labels))
    key = json.loads((await reader.readuntil(b"}")).partition(b"\r\n\r\n")[2])["key"]
    writer.close()
    requests = {
        "serve, light": ("serve", [get("/health"), get("/props")]),
        "serve, embeddings": ("serve", [*images, *requests_of("text", 96)]),
        "demo, light": ("demo", [get("/"), get("/api/bundles")]),
        "demo, classify": ("demo", [post(f"/api/classify?labels={key}", picture)]),
    }
    waits = {name: Waits() for name in requests}
    hostile = [path.read_bytes() for path in sorted(HOSTILE.iterdir())]
    delays: list[float] = []
    memories: list[dict[str, float]] = []

    async def watch() -> None:
        await asyncio.sleep(WARM_UP * seconds)
        while time.perf_counter() < until:
            memories.append(memory())
            await asyncio.sleep(min(10.0, seconds / 10))

    tasks: list[Any] = [watch(), sleeper(delays, until)]
    for name, (server, contents) in requests.items():
        tasks += [good_client(ports[server], contents, waits[name], until, 0.2) for _ in range(2)]
    for server, port in ports.items():
        request = images[0] if server == "serve" else requests["demo, classify"][1][0]
        tasks += [slow_client(port, request, until) for _ in range(SLOW)]
        tasks += [leaving_client(port, request, until)]
        tasks += [hostile_client(port, hostile, until, seed) for seed in range(HOSTILE_CLIENTS)]
    await asyncio.gather(*tasks)
    first, last = memories[0], memory()
    return {
        "good_clients": {name: wait.figures() for name, wait in waits.items()},
        "machine_delay_ms_max": round(1e3 * max(delays), 1),
        "memory_mb_first": first,
        "memory_mb_last": last,
        "memory_growth": {name: round(last[name] / first[name] - 1, 4) for name in first},
    }


def soak_servers(seconds: float, scratch: Path) -> dict[str, Any]:
    """Return the figures of `serve` and `demo` under load."""
    bundle = make_bundle(scratch)
    servers: dict[str, subprocess.Popen[str]] = {}
    ports: dict[str, int] = {}
    try:
        for name in ("serve", "demo"):
            command = [sys.executable, "-m", "clip_rd_edge", name, str(bundle), "--port", "0", "--threads", "1"]
            log = (scratch / f"{name}.log").open("w")
            servers[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
            log.close()
            stdout = servers[name].stdout
            assert stdout is not None
            ports[name] = int(stdout.readline().strip().rstrip("/").rsplit(":", 1)[1])

        def memory() -> dict[str, float]:
            pages = {name: int(Path(f"/proc/{s.pid}/statm").read_text().split()[1]) for name, s in servers.items()}
            return {name: round(count * os.sysconf("SC_PAGE_SIZE") / 1e6, 1) for name, count in pages.items()}

        figures = asyncio.run(load_both(ports, seconds, memory))
        figures["log_bytes"] = {name: (scratch / f"{name}.log").stat().st_size for name in servers}
    finally:
        for server in servers.values():
            server.terminate()
    figures["exit_codes"] = {name: server.wait(60) for name, server in servers.items()}
    return figures


def distill_command(folder: Path, run: Path, steps: int) -> list[str]:
    """Return the command of a run, which is resumed if it is there."""
    options = f"--steps {steps} --batch-size 8 --checkpoint-every 20 --workers 1 --seed 0 --precision fp32 --resume"
    model = "--student test_convnext --image-size 32 --text 64x1 --context-length 8 --embedding-size 8 --recipe clip"
    command = [sys.executable, "-m", "clip_rd_edge", "distill", "--data", str(folder / "pairs.csv"), "-o", str(run)]
    return [*command, *options.split(), *model.split()]


def write_pairs(folder: Path, count: int = 240) -> None:
    """Write images of noise and a table of captions."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    lines = ["filepath,title"]
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{number}.png")
        lines.append(f"{folder / f'{number}.png'},noise number {number}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")


def newest_checkpoint(run: Path) -> Path | None:
    """Return the state of the newest checkpoint of a run."""
    steps = [path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return max(steps, key=lambda path: int(path.name[5:])) / "state.pt" if steps else None


def flip(run: Path) -> None:
    """Flip one bit in the middle of the newest checkpoint."""
    path = newest_checkpoint(run)
    if path is not None and path.is_file():
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 16]))


def cut(run: Path) -> None:
    """Cut the newest checkpoint off, as a file system may after a power failure."""
    path = newest_checkpoint(run)
    if path is not None and path.is_file():
        os.truncate(path, path.stat().st_size // 3)


FULL_DISK = "full disk at a checkpoint"
CHECKPOINT_LIMIT = 1_000_000  # bytes of a file: enough for a batch in shared memory and for the log
FAULTS: dict[str, Callable[[Path], None] | None] = {
    "kill -9": None, "SIGTERM": None, FULL_DISK: None, "flipped bit": flip, "cut checkpoint": cut,
}  # fmt: skip


class Soaked:
    """What has become of the processes of training so far."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.errors: list[str] = []
        self.peaks: list[float] = []  # memory in MB of the processes that trained until a fault ended them

    def train(self, command: list[str], fault: str, every: float) -> int:
        """Run a process until it ends or, after `every` seconds, the fault ends it; return its exit code."""
        limit = CHECKPOINT_LIMIT if fault == FULL_DISK else resource.RLIM_INFINITY

        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails, as on a full disk

        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=limited, start_new_session=True,
        )  # fmt: skip
        try:
            _, said = process.communicate(timeout=every if fault else None)
        except subprocess.TimeoutExpired:
            self.peaks.append(memory_mb(process.pid, "VmHWM"))
            if fault == "SIGTERM":
                process.terminate()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            _, said = process.communicate()
        code = process.returncode
        self.codes[str(code)] += 1
        if code == 2:
            raise SystemExit(said)  # this script's own fault
        if "--debug to see the traceback" in said or "Traceback" in said or (not fault and code != 0):
            self.errors.append(f"after {fault or 'no fault'}, exit code {code}: {' '.join(said.split())[-300:]}")
        return code


def memory_mb(process: int, kind: str) -> float:
    """Return VmRSS (now) or VmHWM (at most) of a process in MB; 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(kind):
                return round(int(line.split()[1]) * 1024 / 1e6, 1)
    return 0.0


def watch_memory(process: subprocess.Popen[bytes], memories: list[float], every: float = 5.0) -> None:
    """Note the memory of a process as long as it runs."""
    while process.poll() is None:
        memories.append(memory_mb(process.pid, "VmRSS"))
        time.sleep(every)


def soak_training(seconds: float, scratch: Path, *, every: float, steps: int) -> dict[str, Any]:
    """Return the figures of runs that meet a fault every `every` seconds, and of the same one without."""
    write_pairs(scratch)
    soaked, started, memories = Soaked(), time.monotonic(), list[float]()
    command = distill_command(scratch, scratch / "alone", steps)
    alone = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    watch = threading.Thread(target=watch_memory, args=(alone, memories))
    watch.start()
    runs: list[Path] = []
    names = list(FAULTS)
    failed = False  # without a fault
    while not failed and (not runs or time.monotonic() - started < seconds):
        runs.append(scratch / f"run-{len(runs)}")
        code = None
        while code != 0 and not failed:
            over = time.monotonic() - started > seconds
            fault = "" if over else names[soaked.faults.total() % len(names)]
            code = soaked.train(distill_command(scratch, runs[-1], steps), fault, every)
            failed = code != 0 and not fault
            if code != 0 and fault:
                soaked.faults[fault] += 1
                if damage := FAULTS[fault]:
                    damage(runs[-1])
    with_faults = time.monotonic() - started
    watch.join()
    weights = [path / "student" / "open_clip_model.safetensors" for path in (scratch / "alone", *runs)]
    first = weights[0].read_bytes() if alone.returncode == 0 else b""
    settled = [memory for memory in memories[int(len(memories) * WARM_UP) :] if memory]  # the first ones import
    return {
        "steps": steps,
        "seconds_with_faults": round(with_faults),
        "runs": len(runs),
        "faults": dict(soaked.faults),
        "exit_codes": dict(soaked.codes),
        "errors": soaked.errors,
        "same_weights_as_without_faults": [path.is_file() and path.read_bytes() == first for path in weights[1:]],
        "left_over": sorted(path.name for path in scratch.rglob(".*") if path.name.endswith((".tmp", ".old"))),
        "peak_memory_mb_first": soaked.peaks[0] if soaked.peaks else None,
        "peak_memory_mb_last": soaked.peaks[-1] if soaked.peaks else None,
        "peak_memory_mb_max": max(soaked.peaks, default=None),
        "memory_growth_without_faults": round(settled[-1] / settled[0] - 1, 4) if settled else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["servers", "training"])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between the faults of training")
    parser.add_argument("--steps", type=int, default=3_000, help="of each training run")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if options.what == "servers":
            figures = soak_servers(options.seconds, scratch)
        else:
            figures = soak_training(options.seconds, scratch, every=options.every, steps=options.steps)
    about = {**here_and_now(), "seconds": options.seconds}
    loads = {"load_average": [round(load, 1), round(os.getloadavg()[0], 1)]}  # of the machine, before and after
    print_record({**about, **loads, **figures}, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
