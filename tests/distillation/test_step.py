"""Several processes, chunks and blocks give the same result as one process in one pass, in float32."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("gradients.py")


NO_BATCH_NORM = "test_vit"  # whose statistics would depend on how the batch is split
CASES = {  # by the number of processes
    1: (NO_BATCH_NORM, f"{NO_BATCH_NORM} chunks=4", f"{NO_BATCH_NORM} block=3"),
    2: (
        NO_BATCH_NORM,
        f"{NO_BATCH_NORM} global_logits=1",
        f"{NO_BATCH_NORM} chunks=2 block=3",
        "resnet18 chunks=2",
    ),
}


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Any]:
    """Return a function that returns the results of a case; all cases of some number of processes share one start."""

    @cache
    def compute(processes: int) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(f"processes-{processes}")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), str(folder), *CASES[processes]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr[-3000:]
        return {
            case: torch.load(folder / f"{number}.pt", weights_only=True) for number, case in enumerate(CASES[processes])
        }

    return lambda processes, case: compute(processes)[case]


@pytest.mark.parametrize(
    ("processes", "case"),
    [(1, CASES[1][1]), (1, CASES[1][2]), (2, CASES[2][0]), (2, CASES[2][1]), (2, CASES[2][2])],
    ids=[
        "four chunks",
        "blocks",
        "two processes, local logits",
        "two processes, global logits",
        "two processes, chunks and blocks",
    ],
)
def test_loss_and_gradients_are_those_of_the_global_batch(
    computed: Callable[[int, str], Any], processes: int, case: str
) -> None:
    expected = computed(1, NO_BATCH_NORM)[0]
    for actual in computed(processes, case):
        torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-5, atol=1e-5)
        for name, term in expected["terms"].items():
            torch.testing.assert_close(actual["terms"][name], term, rtol=1e-5, atol=1e-5)
        assert actual["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            scale = max(1.0, gradient.abs().max().item())
            difference = (actual["gradients"][name] - gradient).abs().max().item()
            assert difference <= 1e-5 * scale, name


def test_a_step_sends_few_messages_however_many_layers_there_are(computed: Callable[[int, str], Any]) -> None:
    # Embeddings; the loss and its gradients; buffers, by dtype; and a few buckets of gradients, after the last chunk.
    _, result = computed(2, CASES[2][3])
    messages = dict(result["messages"])
    assert messages.pop("all_reduce") <= 4
    assert messages == {"broadcast": 2, "all_gather": 1}
