"""After `kill -9` or SIGTERM at several moments, --resume leads to the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import process_tree, write_shards

from benchmarks.data.unreliable_server import UnreliableServer
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip

STEPS, CHECKPOINT_EVERY = 12, 2


def command(data: str | Path, run: Path, *, processes: int = 1, workers: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [
        *(sys.executable, *launcher, "-m", "clip_rd_edge", "distill", "--data", str(data), "--recipe", "clip"),
        *("--student", "test_vit", "--image-size", "48", "--text", "64x1", "--context-length", "8"),
        *("--embedding-size", "16", "--batch-size", "4", "--steps", str(STEPS), "--precision", "fp32"),
        *("--checkpoint-every", str(CHECKPOINT_EVERY), "--workers", str(workers), "--resume", "-o", str(run)),
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


def kill_when(arguments: list[str], run: Path, pattern: str) -> bool:
    """Start a run and kill it when a file matching `pattern` exists; return whether it was still running then."""
    process = start(arguments)
    while process.poll() is None and not any(run.glob(pattern)):
        time.sleep(0.001)
    running = process.poll() is None
    if running:
        for pid in process_tree(process.pid):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    return running


@pytest.fixture(params=["table", "shards"])
def data(request: pytest.FixtureRequest, pairs_csv: Path) -> str:
    return str(pairs_csv) if request.param == "table" else write_shards(pairs_csv)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes to kill in /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_three_times_ends_with_the_same_weights(data: str, processes: int, tmp_path: Path) -> None:
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    finish(command(data, uninterrupted, processes=processes))
    arguments = command(data, killed, processes=processes)
    moments = ["config.yaml", "checkpoints/.step-*.tmp/state.pt", "checkpoints/step-6"]
    assert all(kill_when(arguments, killed, moment) for moment in moments)
    assert not (killed / "student").exists()
    finish(arguments)
    expected, actual = (load_file(run / "student" / "open_clip_model.safetensors") for run in (uninterrupted, killed))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes to kill in /proc")
def test_a_run_on_remote_shards_survives_kills_and_failing_requests_with_the_weights_of_local_ones(
    pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    local, remote = tmp_path / "local", tmp_path / "remote"
    finish(command(write_shards(pairs_csv), local))
    # The cache holds one and a half of three shards, so that each is fetched many times.
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CLIP_RD_EDGE_SHARD_CACHE_GB", str(1.5 * (tmp_path / "0.tar").stat().st_size / 1e9))
    with UnreliableServer(tmp_path, latency_s=0.02, failing_share=0.05).running() as server:
        arguments = command(f"{server.url}/{{0..2}}.tar", remote, workers=2)
        moments = ["config.yaml", "checkpoints/.step-*.tmp/state.pt", "checkpoints/step-6"]
        assert all(kill_when(arguments, remote, moment) for moment in moments)
        finish(arguments)
        assert server.failed
    expected, actual = (load_file(run / "student" / "open_clip_model.safetensors") for run in (local, remote))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes to kill in /proc")
def test_a_run_on_two_processes_can_be_resumed_on_one(pairs_csv: Path, tmp_path: Path) -> None:
    """Batches and loss stay the same; without batch norms and dropout, results differ only by rounding."""
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    finish(command(pairs_csv, uninterrupted, processes=1))
    assert kill_when(command(pairs_csv, killed, processes=2), killed, "checkpoints/step-6")
    finish(command(pairs_csv, killed, processes=1))
    # Compare embeddings, not weights: if a gradient is 0, as for a key bias, AdamW turns rounding errors into steps.
    expected, actual = (TorchEncoder(load_clip(str(run))) for run in (uninterrupted, killed))
    images = [open_image(path) for path in sorted((pairs_csv.parent / "pictures").iterdir())]
    embeddings = expected.encode_images(images)
    difference = np.abs(embeddings - actual.encode_images(images)).max()
    spread = np.abs(embeddings - embeddings.mean(axis=0)).max()
    assert difference < 1e-3 < 0.1 * spread


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes to signal in /proc")
@pytest.mark.parametrize("everyone", [True, False], ids=["to all processes", "to the leader alone"])
def test_sigterm_saves_the_run_which_resumes_to_the_same_weights(
    pairs_csv: Path, everyone: bool, tmp_path: Path
) -> None:
    """Slurm, systemd and a shell signal all processes of a job, workers included; Docker only the first."""
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    finish(command(pairs_csv, uninterrupted))
    arguments = command(pairs_csv, stopped, workers=2)
    process = start(arguments)
    while process.poll() is None and not any(stopped.glob("checkpoints/step-4")):
        time.sleep(0.001)
    tree = process_tree(process.pid)
    assert len(tree) >= 3
    for pid in reversed(tree) if everyone else [process.pid]:
        os.kill(pid, signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 75, error
    assert "Stopped by SIGTERM after step" in error
    assert not any(Path(f"/proc/{pid}").exists() for pid in tree)
    finish(arguments)
    expected, actual = (load_file(run / "student" / "open_clip_model.safetensors") for run in (uninterrupted, stopped))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
