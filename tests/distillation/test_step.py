"""A step on two processes learns what one process learns from the whole batch."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_processes import start_two

from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.step import StepSettings

SCRIPT = Path(__file__).with_name("gradients.py")
NO_BATCH_NORM = "test_vit"  # whose statistics would depend on how the batch is split
SETTINGS = ("", "global_logits=1", "chunks=2 block=3")


@pytest.fixture(autouse=True, scope="module")
def small_vocabulary() -> None:
    """None: the processes know all of CLIP's tokens."""


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of all cases on two processes, which share one start."""
    folder = tmp_path_factory.mktemp("processes")
    cases = [f"{NO_BATCH_NORM} {settings}".strip() for settings in SETTINGS]
    for process in start_two([str(SCRIPT), str(folder), *cases]):
        _, error = process.communicate()
        assert process.returncode == 0, error[-3000:]
    return {key: torch.load(folder / f"{number}.pt", weights_only=True) for number, key in enumerate(SETTINGS)}


@pytest.fixture(scope="module")
def of_one_process() -> dict[str, Any]:
    two_steps = runpy.run_path(str(SCRIPT))["two_steps"]
    result: dict[str, Any] = two_steps(NO_BATCH_NORM, StepSettings(), Processes())[0]
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
