"""Tiny WebDataset shards, and a cache of indices of its own for each test."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WriteTar = Callable[[Path, Mapping[str, bytes]], Path]
Picture = Callable[..., bytes]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    # The emoji are drawn once for all tests.
    if "emoji" not in request.module.__name__:
        monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write_tar() -> WriteTar:
    """Write a tar of the given members; its folder is made."""

    def write(path: Path, members: Mapping[str, bytes]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path

    return write


@pytest.fixture
def picture() -> Picture:
    """An encoded noisy picture whose upper left pixel is of the grey `value`."""

    def encode(value: int, kind: str = "png") -> bytes:
        pixels = np.random.default_rng(value).integers(0, 255, (20, 24, 3)).astype(np.uint8)
        pixels[0, 0] = value
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, **({"lossless": True} if kind == "webp" else {}))
        return buffer.getvalue()

    return encode
