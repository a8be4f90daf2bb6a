"""Tiny random students, and a float32 bundle and a calibration set made once for all tests here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_rd_edge.exporters.bundle import export_bundle
from clip_rd_edge.exporters.calibration import CalibrationSet, Samples
from clip_rd_edge.exporters.onnx import export_image_tower
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.student import build_student, student_config

IMAGE_SIZE, CONTEXT_LENGTH = 32, 16
WORDS = ["a", "red", "green", "blue", "cat", "dog", "house", "tree", "under", "photo", "drawing", "small"]


@pytest.fixture(scope="session")
def make_student() -> Callable[..., ClipModel]:
    """A student with random weights, the same each time."""

    def make(trunk: str = "resnet10t", image_size: int = IMAGE_SIZE) -> ClipModel:
        torch.manual_seed(0)
        config = student_config(
            trunk, embedding_size=32, image_size=image_size, text="tiny", context_length=CONTEXT_LENGTH
        )
        return build_student(config, name=trunk)

    return make


@pytest.fixture(scope="session")
def image_tower(
    make_student: Callable[..., ClipModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[ClipModel, Path]]:
    """A student at 64 pixels by its trunk, and its exported image tower: each exported once."""

    @cache
    def export(trunk: str) -> tuple[ClipModel, Path]:
        clip = make_student(trunk, image_size=64)
        return clip, export_image_tower(clip, tmp_path_factory.mktemp(trunk))

    return export


@pytest.fixture(scope="session")
def student(make_student: Callable[..., ClipModel]) -> ClipModel:
    """A resnet10t at 32 pixels."""
    return make_student()


@pytest.fixture(scope="session")
def fp32_bundle(student: ClipModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's float32 bundle; not to be changed."""
    bundle = tmp_path_factory.mktemp("bundles") / "fp32"
    export_bundle(student, bundle, precision="fp32", labels=["cat", "dog"], provenance={"model": "tiny"})
    return bundle


@pytest.fixture(scope="session")
def calibration(student: ClipModel) -> CalibrationSet:
    """Noise pictures of different brightness, and captions of random words."""
    rng = np.random.default_rng(0)

    def samples(count: int) -> Samples:
        level = rng.uniform(-1, 1, (count, 3, 1, 1))
        pixels = (level + 0.5 * rng.standard_normal((count, 3, IMAGE_SIZE, IMAGE_SIZE))).astype(np.float32)
        captions = [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]
        return Samples(pixels, student.tokenizer(captions).numpy())

    return CalibrationSet("noise", calibrate=samples(32), judge=samples(24))
