from __future__ import annotations

from pathlib import Path

import pytest

from clip_rd_edge.exporting.graph import prepare_for_quantization


@pytest.fixture(scope="session")
def prepared(fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The towers of the float32 bundle by name, as candidates are made from them: do not change them."""
    folder = tmp_path_factory.mktemp("prepared")
    return {name: prepare_for_quantization(fp32_bundle / f"{name}.onnx", folder) for name in ("image", "text")}
