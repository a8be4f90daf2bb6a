"""A build of a tiny student from three kinds of data: its stages are kept, and what cannot be built is refused."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import Watch, save_tiny_teacher

import clip_rd_edge as edge
from clip_rd_edge.building.plan import PLAN, Plan
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, InputError, UsageError
from clip_rd_edge.utils.structs import read_yaml

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 210), "grey": (120, 120, 120)}


def save_images(folder: Path, count: int = 12) -> Path:
    """Write images of four classes, with texture that makes no two of them alike."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            texture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((48, 48))
            Image.blend(Image.new("RGB", (48, 48), colour), texture, 0.3).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_images(folder / "images")
    save_tiny_teacher(folder / "teacher")
    return folder


def build(world: Path, output: Path, **changed: Any) -> edge.BuiltBundle:
    options = {
        "data": world / "images", "teacher": world / "teacher", "student": "test_resnet", "image_size": 48, "steps": 3,
        "target": "openvino", "workers": 0, **changed,
    }  # fmt: skip
    return edge.build(output=output, **options)


@pytest.fixture(scope="module")
def built(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "out"
    build(world, output)
    return output


def state(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
