"""Two nodes, here two torchrun agents, train the weights of one process, and survive a kill."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import is_running, process_tree, save_tiny_teacher

from clip_rd_edge.distillation.config import commented_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the process to kill in /proc"),
]
TIMEOUT_S = 300


@pytest.fixture(autouse=True, scope="module")
def small_vocabulary() -> None:
    """None: the nodes know all of CLIP's tokens."""


@pytest.fixture(params=[True, False], ids=["shared folders", "separate folders"])
def nodes(request: pytest.FixtureRequest, pairs_csv: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The working folders of two nodes, with pairs, teacher and recipe: one and the same, or one for each."""
    first, second = tmp_path / "first", tmp_path / "second"
    save_tiny_teacher(first / "teacher")
    shutil.copytree(pairs_csv.parent / "pictures", first / "pictures")
    shutil.copy2(pairs_csv, first)
    # With AdamW's own epsilon, rounding errors of gradients that are 0, as those of key biases, become whole steps.
    (first / "recipe.yaml").write_text(commented_recipe("clip-rd").replace("epsilon: 1.0e-06", "epsilon: 1e-3"))
    assert "epsilon: 1e-3" in (first / "recipe.yaml").read_text()
    if request.param:
        return first, first
    shutil.copytree(first, second)
    return first, second


def distil(run: str) -> list[str]:
    return [
        *("-m", "clip_rd_edge", "distill", "--data", "pairs.csv", "--teacher", "teacher", "--recipe", "recipe.yaml"),
        *("--student", "test_vit", "--image-size", "48", "--text", "64x1", "--context-length", "12"),
        *("--batch-size", "4", "--steps", "12", "--precision", "fp32", "--checkpoint-every", "2"),
        *("--workers", "1", "--resume", "-o", run),
    ]


def start(nodes: tuple[Path, Path], run: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    processes = []
    for node, folder in enumerate(nodes):
        command = [sys.executable, *launcher, "--master-port", str(port), "--node-rank", str(node)]
        variables = {"HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment = {**os.environ, **variables}
        processes.append(
            subprocess.Popen([*command, *distil(run)], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        )
    return processes


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for both agents; return their messages on one line each."""
    try:
        return [" ".join(process.communicate(timeout=TIMEOUT_S)[1].split()) for process in processes]
    finally:
        for process in processes:
            for pid in process_tree(process.pid) if process.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
            process.communicate()


def train(nodes: tuple[Path, Path], run: str) -> dict[str, torch.Tensor]:
    processes = start(nodes, run)
    messages = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], messages
    return weights(nodes, run)


def weights(nodes: tuple[Path, Path], run: str) -> dict[str, torch.Tensor]:
    assert nodes[0] == nodes[1] or not (nodes[1] / run).exists()
    return load_file(nodes[0] / run / "student" / "open_clip_model.safetensors")


def worker(agent: int) -> int:
    """The process that an agent has started: the first below it whose rank is in its environment."""
    tree = process_tree(agent)
    return next(pid for pid in tree if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes())


@pytest.mark.parametrize("nodes", [False], indirect=True, ids=["separate folders"])
def test_two_nodes_train_the_weights_of_one_process(nodes: tuple[Path, Path]) -> None:
    environment = {**os.environ, "HOME": str(nodes[0] / "home"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *distil("one")], cwd=nodes[0], env=environment, check=True, timeout=TIMEOUT_S)
    expected, actual = weights(nodes, "one"), train(nodes, "two")
    assert actual.keys() == expected.keys()
    assert max((actual[name] - expected[name]).abs().max().item() for name in expected) <= 1e-5


@pytest.mark.parametrize("killed", [0, 1])
def test_a_worker_that_is_killed_ends_both_nodes_and_the_run_resumes_to_the_same_weights(
    nodes: tuple[Path, Path], killed: int
) -> None:
    expected = train(nodes, "uninterrupted")
    agents = start(nodes, "killed")
    while not any((nodes[0] / "killed").glob("checkpoints/step-4")):
        assert all(agent.poll() is None for agent in agents), finish(agents)
        time.sleep(0.001)
    lost, other = worker(agents[killed].pid), worker(agents[1 - killed].pid)
    os.kill(lost, signal.SIGKILL)
    killed_at = time.monotonic()
    while is_running(other):
        assert time.monotonic() - killed_at < 30
        time.sleep(0.01)
    messages = finish(agents)  # torchrun's own processes, which a busy machine takes long to take down
    assert all(agent.returncode for agent in agents)
    assert f"error: Process {killed} (on {socket.gethostname()}) of the run has ended" in messages[1 - killed]
    assert not (nodes[0] / "killed" / "student").exists()
    actual = train(nodes, "killed")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
