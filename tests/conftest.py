"""Small real things that many tests need: pictures, a table of pairs, tiny random models."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 220), "yellow": (230, 220, 40)}


@pytest.fixture
def pairs_csv(tmp_path: Path) -> Path:
    """A CSV in open_clip's conventions: 24 noisy pictures of four colours with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        name = list(COLOURS)[i % 4]
        noise = rng.integers(-20, 20, (40, 48, 3))
        pixels = (np.asarray(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append((f"pictures/{i}.png", f"a {name} picture number {i}"))
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    return path


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `clip-rd-edge` in this process; returns exit code, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        from clip_rd_edge.cli.main import main

        monkeypatch.setattr(sys, "argv", ["clip-rd-edge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        output = capsys.readouterr()
        return int(exit_.value.code or 0), output.out, output.err

    return run
