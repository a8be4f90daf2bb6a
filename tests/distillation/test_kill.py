"""`kill -9` at any moment, one of them while a checkpoint is being written, then --resume: the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clip_rd_edge.contract.images import open_image
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip

STEPS, EVERY = 12, 2


def command(data: Path, run: Path, *, processes: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [
        *(sys.executable, *launcher, "-m", "clip_rd_edge", "distill", "--data", str(data), "--recipe", "clip"),
        *("--student", "test_vit", "--image-size", "160", "--text", "tiny", "--context-length", "8"),
        *("--embedding-size", "16", "--batch-size", "4", "--steps", str(STEPS), "--precision", "fp32"),
        *("--checkpoint-every", str(EVERY), "--workers", "1", "--resume", "-o", str(run)),
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(arguments: list[str]) -> None:
    process = start(arguments)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]


def family(pid: int) -> list[int]:
    """A process and all that it started: torchrun gives its workers groups of their own."""
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return [pid, *(descendant for child in children for descendant in family(child))]


def kill_when(arguments: list[str], run: Path, pattern: str) -> bool:
    """Start, and kill every process when a file of that pattern is there; whether it was there in time."""
    process = start(arguments)
    while process.poll() is None and not any(run.glob(pattern)):
        time.sleep(0.001)
    in_time = process.poll() is None
    if in_time:
        for pid in family(process.pid):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    return in_time


@pytest.fixture(params=["table", "shards"])
def data(request: pytest.FixtureRequest, pairs_csv: Path) -> Path:
    if request.param == "table":
        return pairs_csv
    shard = pairs_csv.with_suffix(".tar")
    with tarfile.open(shard, "w") as archive:
        for number, line in enumerate(pairs_csv.read_text().splitlines()[1:]):
            name, caption = line.split(",")
            (pairs_csv.parent / "caption.txt").write_text(caption)
            archive.add(pairs_csv.parent / name, f"{number:04}.png")
            archive.add(pairs_csv.parent / "caption.txt", f"{number:04}.txt")
    return shard


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes to kill in /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_thrice_it_ends_with_the_same_weights(data: Path, processes: int, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(command(data, whole, processes=processes))
    arguments = command(data, killed, processes=processes)
    moments = ["config.yaml", "checkpoints/.step-*.tmp/state.pt", "checkpoints/step-6"]
    assert all(kill_when(arguments, killed, moment) for moment in moments)
    assert not (killed / "student").exists()
    finish(arguments)
    one, other = (load_file(run / "student" / "open_clip_model.safetensors") for run in (whole, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes to kill in /proc")
def test_begun_on_two_processes_it_goes_on_on_one(pairs_csv: Path, tmp_path: Path) -> None:
    """The same batches and the same loss: without batch norms and dropout, only rounding differs."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(command(pairs_csv, whole, processes=1))
    assert kill_when(command(pairs_csv, killed, processes=2), killed, "checkpoints/step-6")
    finish(command(pairs_csv, killed, processes=1))
    # By embeddings: where a gradient is 0, as of an attention's key bias, AdamW makes steps of rounding errors alone.
    one, other = (TorchEncoder(load_clip(str(run))) for run in (whole, killed))
    pictures = [open_image(path) for path in sorted((pairs_csv.parent / "pictures").iterdir())]
    difference = np.abs(one.encode_images(pictures) - other.encode_images(pictures)).max()
    spread = np.abs(one.encode_images(pictures) - one.encode_images(pictures).mean(axis=0)).max()
    assert difference < 1e-3 < 0.1 * spread
