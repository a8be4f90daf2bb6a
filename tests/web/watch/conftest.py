"""A run's folder as `distill` leaves it, without a training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

CONFIG = "recipe_name: clip\nrecipe: {steps: STEPS, epochs: 2, batch_size: 4, more: 1}\ndata: pairs.csv\nstudent: x\n"


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """Return a function that writes a run with a line for every fifth step."""

    def make(folder: Path, *, steps: int = 50, logged: int = 20) -> Path:
        folder.mkdir()
        (folder / "config.yaml").write_text(CONFIG.replace("STEPS", str(steps)))
        lines = [
            {"step": step, "loss": 3.0 - step / 20, "loss/task": 3.0 - step / 20, "seconds_per_step": 0.5}
            for step in range(5, logged + 1, 5)
        ]
        (folder / "metrics.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        return folder

    return make
