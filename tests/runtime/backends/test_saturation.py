from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest

from clip_rd_edge.runtime.backends import onnxruntime, saturation
from clip_rd_edge.runtime.backends.saturation import processor_saturates


@pytest.fixture(autouse=True)
def unasked() -> Iterator[None]:
    processor_saturates.cache_clear()
    yield
    processor_saturates.cache_clear()


@pytest.mark.parametrize(("total", "saturating"), [(2_072_640, False), (1_048_544, True)])
@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])  # AMD64 is Windows's name
def test_an_x86_processor_is_asked_once_by_a_product(
    machine: str, total: int, saturating: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Session:
        def run(self, names: None, feed: dict[str, Any]) -> list[Any]:
            asked.append(feed["a"].astype(np.int32) @ feed["b"].astype(np.int32))
            return [np.full_like(asked[0], total)]

    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(onnxruntime, "open_session", lambda content, *, threads: Session())
    assert [processor_saturates() for _ in range(3)] == [saturating] * 3
    assert [row.tolist() for row in asked] == [[[2_072_640]]]


def test_other_processors_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(onnxruntime, "open_session", None)
    assert not processor_saturates()


def test_the_product_is_an_onnx_file_that_runs_here() -> None:
    onnx.checker.check_model(onnx.load_from_string(saturation._PRODUCT))
    feed = {"a": np.full((2, 3), 2, np.uint8), "b": np.full((3, 2), -5, np.int8)}
    (product,) = onnxruntime.open_session(saturation._PRODUCT).run(None, feed)
    assert product.tolist() == [[-30, -30], [-30, -30]]
    assert processor_saturates() in (False, True)


def test_asking_imports_no_onnx() -> None:
    code = (
        "import sys; from clip_rd_edge.runtime.backends.saturation import processor_saturates as ask;"
        "assert 'onnxruntime' not in sys.modules; ask(); assert 'onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
