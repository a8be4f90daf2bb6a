"""Checkpoints of a run: all that a resumed run needs to go on as if it had never stopped."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.utils.io import new_folder

KEPT = 2  # checkpoints; the one before the last is there in case the disk damaged the last


class Stateful(Protocol):
    """Something with a state, such as a module."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """The reverse."""
        ...


def save_state(run: Path, step: int, parts: Mapping[str, Stateful]) -> Path:
    """Write `checkpoints/step-N`, whole or not at all, and remove all but the newest KEPT.

    Args:
        step: steps done. Schedule, data position and what is drawn at random follow from it and the seed; they have
            no state of their own.
        parts: model, objective and update.
    """
    state = {"step": step, **{name: part.state_dict() for name, part in parts.items()}}
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


def load_state(run: Path, parts: Mapping[str, Stateful]) -> int:
    """Load the newest readable checkpoint; returns the steps done, 0 where there is none.

    Raises:
        ConfigError: there are checkpoints, and none can be read.
    """
    problems = []
    for folder in reversed(saved_states(run)):
        try:
            state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001  a damaged file raises anything; the one before may be sound
            problems.append(f"{folder.name}: {error}")
            continue
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return int(state["step"])
    if problems:
        raise ConfigError(f"No checkpoint in {run / 'checkpoints'} can be read ({problems[0]}).", hint="begin anew")
    return 0


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, for whatever draws from a global generator, such as a layer's first weights."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
