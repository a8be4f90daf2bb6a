"""A step on two processes, started by torchrun, learns what one process learns from the whole batch."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.step import StepSettings

SCRIPT = Path(__file__).with_name("gradients.py")
NO_BATCH_NORM = "test_vit"  # whose statistics would depend on how the batch is split
SETTINGS = ("", "global_logits=1", "chunks=2 block=3")
WITH_BATCH_NORM = "test_resnet chunks=2"


@pytest.fixture(autouse=True, scope="module")
def small_vocabulary() -> None:
    """None: the processes know all of CLIP's tokens."""


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of all cases on two processes, which share one start."""
    folder = tmp_path_factory.mktemp("processes")
    cases = [*(f"{NO_BATCH_NORM} {settings}".strip() for settings in SETTINGS), WITH_BATCH_NORM]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), *cases]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    keys = (*SETTINGS, WITH_BATCH_NORM)
    return {key: torch.load(folder / f"{number}.pt", weights_only=True) for number, key in enumerate(keys)}


@pytest.fixture(scope="module")
def of_one_process() -> dict[str, Any]:
    two_steps = runpy.run_path(str(SCRIPT))["two_steps"]
    result: dict[str, Any] = two_steps(NO_BATCH_NORM, StepSettings(), Processes(), SimpleNamespace(counts={}))[0]
    return result


@pytest.mark.parametrize("settings", SETTINGS, ids=["local logits", "global logits", "chunks and blocks"])
def test_loss_and_gradients_are_those_of_the_global_batch(
    of_one_process: dict[str, Any], of_two_processes: dict[str, Any], settings: str
) -> None:
    expected = of_one_process
    for actual in of_two_processes[settings]:
        torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-5, atol=1e-5)
        for name, term in expected["terms"].items():
            torch.testing.assert_close(actual["terms"][name], term, rtol=1e-5, atol=1e-5)
        assert actual["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            scale = max(1.0, gradient.abs().max().item())
            difference = (actual["gradients"][name] - gradient).abs().max().item()
            assert difference <= 1e-5 * scale, name


def test_a_step_sends_few_messages_however_many_layers_there_are(of_two_processes: dict[str, Any]) -> None:
    # Embeddings; the loss and its gradients; buffers, by dtype; and a few buckets of gradients, after the last chunk.
    _, result = of_two_processes[WITH_BATCH_NORM]
    messages = dict(result["messages"])
    assert messages.pop("all_reduce") <= 4
    assert messages == {"broadcast": 2, "all_gather": 1}
