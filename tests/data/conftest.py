"""Fixtures for small WebDataset shards and a server of them, and a separate cache folder per test."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import support
from PIL import Image

from benchmarks.data.unreliable_server import UnreliableServer
from clip_rd_edge.data import remote
from clip_rd_edge.errors import ClipRdEdgeError

WriteTar = Callable[[Path, Mapping[str, bytes]], Path]
EncodeImage = Callable[..., bytes]


@pytest.fixture(autouse=True)
def _separate_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    # The emoji are rendered once for all tests.
    if "emoji" not in request.module.__name__:
        monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write_tar() -> WriteTar:
    """Write a tar with the given members, creating its folder."""
    return support.write_tar


@pytest.fixture
def encode_image() -> EncodeImage:
    """Encode a noise image whose upper left pixel has the grey level `value`."""

    def encode(value: int, kind: str = "png") -> bytes:
        pixels = np.random.default_rng(value).integers(0, 255, (20, 24, 3)).astype(np.uint8)
        pixels[0, 0] = value
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, **({"lossless": True} if kind == "webp" else {}))
        return buffer.getvalue()

    return encode


@pytest.fixture
def shards(tmp_path: Path, write_tar: WriteTar, encode_image: EncodeImage) -> Path:
    """Four shards of three samples each."""
    for shard in range(4):
        members = {}
        for i in range(3 * shard, 3 * shard + 3):
            members |= {f"{i:04d}.png": encode_image(i), f"{i:04d}.txt": f"grey {i}".encode()}
        write_tar(tmp_path / "data" / f"{shard:03d}.tar", members)
    return tmp_path / "data"


@pytest.fixture
def flips() -> Callable[[Path, Callable[[], object]], int]:
    """Flip a bit at places all over a file: what is read is the same or an error; returns how often it is an error."""

    def flip(file: Path, read: Callable[[], object]) -> int:
        content, expected, errors = file.read_bytes(), read(), 0
        for place in range(0, len(content), max(1, len(content) // 100)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            try:
                assert read() == expected
            except ClipRdEdgeError:
                errors += 1
        file.write_bytes(content)
        return errors

    return flip


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UnreliableServer]:
    monkeypatch.setattr(remote, "_RETRY_DELAYS_S", (0.01,) * 4)
    monkeypatch.setattr(remote, "_PART_BYTES", 1000)
    monkeypatch.setenv("no_proxy", "*")
    remote._known_versions.clear()
    with UnreliableServer(shards).running() as server:
        yield server
