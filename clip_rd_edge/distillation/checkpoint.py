"""Checkpoints of a run: the complete state, so that a resumed run continues as if it had never stopped."""

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

KEPT_CHECKPOINTS = 2  # the second newest is a fallback in case the newest is damaged on disk


class Stateful(Protocol):
    """An object with a state dictionary, such as a module."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restore a state that `state_dict` returned."""
        ...


def save_checkpoint(run: Path, step: int, parts: Mapping[str, Stateful]) -> Path:
    """Write `checkpoints/step-N` atomically, and remove all but the newest KEPT_CHECKPOINTS.

    Args:
        step: the number of completed steps. Learning-rate schedule, data position and random draws follow from it and
            from the seed, so they need no state.
        parts: what is saved, by its key in the file.
    """
    state = {"step": step, **{name: part.state_dict() for name, part in parts.items()}}
    folder = run / "checkpoints" / f"step-{step}"
    with new_folder(folder) as temporary:
        torch.save(state, temporary / "state.pt")
    for old in list_checkpoints(run)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(run: Path, parts: Mapping[str, Stateful]) -> int:
    """Restore the newest readable checkpoint; return the number of completed steps, 0 without a checkpoint.

    Raises:
        ConfigError: there are checkpoints, but none can be read.
    """
    problems = []
    for folder in reversed(list_checkpoints(run)):
        try:
            state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001  a damaged file can raise anything; the one before may be intact
            problems.append(f"{folder.name}: {error}")
            continue
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return int(state["step"])
    if problems:
        raise ConfigError(
            f"No checkpoint in {run / 'checkpoints'} can be read ({problems[0]}).", hint="start a new run"
        )
    return 0


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch, which initial weights among others are drawn from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
