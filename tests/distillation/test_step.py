"""Several processes, chunks and blocks give the same result as one process in one pass, in float32."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("gradients.py")


NO_BATCH_NORM = "test_vit"  # whose statistics would depend on how the batch is split


def compute(
    output: Path,
    *,
    student: str = NO_BATCH_NORM,
    processes: int = 1,
    chunks: int = 1,
    block: int = 0,
    global_logits: bool = False,
) -> Any:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    arguments = [str(output), student, str(chunks), str(block), str(int(global_logits))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return torch.load(output, weights_only=True)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compute(tmp_path_factory.mktemp("one") / "result.pt")[0]


@pytest.mark.parametrize(
    "variant",
    [
        {"processes": 2},
        pytest.param({"processes": 2, "global_logits": True}, marks=pytest.mark.slow),
        {"processes": 2, "chunks": 2, "block": 3},
        {"chunks": 4},
        {"block": 3},
    ],
    ids=[
        "two processes, local logits",
        "two processes, global logits",
        "processes, chunks and blocks",
        "four chunks",
        "blocks",
    ],
)
def test_loss_and_gradients_are_those_of_the_global_batch(
    expected: Any, variant: dict[str, Any], tmp_path: Path
) -> None:
    for actual in compute(tmp_path / "result.pt", **variant):
        torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-5, atol=1e-5)
        for name, term in expected["terms"].items():
            torch.testing.assert_close(actual["terms"][name], term, rtol=1e-5, atol=1e-5)
        assert actual["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            scale = max(1.0, gradient.abs().max().item())
            difference = (actual["gradients"][name] - gradient).abs().max().item()
            assert difference <= 1e-5 * scale, name


def test_a_step_sends_few_messages_however_many_layers_there_are(tmp_path: Path) -> None:
    # Embeddings; the loss and its gradients; buffers, by dtype; and a few buckets of gradients, after the last chunk.
    _, result = compute(tmp_path / "result.pt", student="resnet18", processes=2, chunks=2)
    assert result["messages"].pop("all_reduce") <= 4
    assert result["messages"] == {"broadcast": 2, "all_gather": 1}
