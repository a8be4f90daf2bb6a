"""Checkpoints of a run: all that a resumed run needs to go on as if it had never stopped."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clip_rd_edge.contract.files import new_folder
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.losses.objective import Objective

KEPT = 2  # checkpoints; the one before the last is there in case the disk damaged the last


def save_state(
    run: Path, step: int, *, model: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer
) -> Path:
    """Write `checkpoints/step-N`, whole or not at all, and remove all but the newest KEPT.

    Args:
        step: steps done. Schedule, data position and what is drawn at random follow from it and the seed; they have
            no state of their own.
    """
    state = {
        "step": step,
        "model": model.state_dict(),
        "objective": objective.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    folder = run / "checkpoints" / f"step-{step}"
    with new_folder(folder) as temporary:
        torch.save(state, temporary / "state.pt")
    for old in saved_states(run)[:-KEPT]:
        shutil.rmtree(old)
    return folder


def saved_states(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_state(run: Path, *, model: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest readable checkpoint; returns the steps done, 0 where there is none.

    Raises:
        ConfigError: there are checkpoints, and none can be read.
    """
    saved = saved_states(run)
    problems = []
    for folder in reversed(saved):
        try:
            state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001  a damaged file raises anything; the one before may be sound
            problems.append(f"{folder.name}: {error}")
            continue
        model.load_state_dict(state["model"])
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])
    if problems:
        raise ConfigError(f"No checkpoint in {run / 'checkpoints'} can be read ({problems[0]}).", hint="begin anew")
    return 0


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, for whatever draws from a global generator, such as a dropout."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
