"""export/litert/classify.py, which a device runs without clip-rd-edge, prepares images as the runtime does."""

from __future__ import annotations

import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.preprocess import Preprocessing, preprocess

SCRIPT = Path(__file__).parents[2] / "export" / "litert" / "classify.py"


@pytest.mark.parametrize(("size", "mode"), [((301, 200), "RGB"), ((200, 331), "RGBA"), ((35, 33), "RGB")])
def test_its_pixels_are_those_of_the_runtime(
    size: tuple[int, int], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = types.ModuleType("ai_edge_litert.interpreter")
    stub.Interpreter = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ai_edge_litert", types.ModuleType("ai_edge_litert"))
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", stub)
    script = runpy.run_path(str(SCRIPT))
    channels = len(mode)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(pixels, mode).save(tmp_path / "image.png")
    settings = Preprocessing(size=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    manifest = {"preprocessing": {"size": [32, 32], "mean": settings.mean, "std": settings.std}}
    expected = preprocess(open_image(tmp_path / "image.png"), settings)
    np.testing.assert_allclose(script["preprocess"](tmp_path / "image.png", manifest)[0], expected, atol=1e-6)
