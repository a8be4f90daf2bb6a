from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest

from clip_rd_edge.runtime.backends import onnxruntime as int8_kernels
from clip_rd_edge.runtime.backends.onnxruntime import int8_fault, open_session, processor_saturates, wrong_sums


@pytest.fixture(autouse=True)
def unasked() -> Iterator[None]:
    for probe in (processor_saturates, wrong_sums):
        probe.cache_clear()
    yield
    for probe in (processor_saturates, wrong_sums):
        probe.cache_clear()


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
    monkeypatch.setattr(int8_kernels, "open_session", lambda content, *, threads: Session())
    assert [processor_saturates() for _ in range(3)] == [saturating] * 3
    assert [row.tolist() for row in asked] == [[[2_072_640]]]


class Sums:
    """A session that multiplies rightly but for `error` in one entry, as the kernel for AMX does in some versions."""

    def __init__(self, error: int) -> None:
        self.error, self.feeds = error, []  # type: ignore[var-annotated]

    def run(self, names: None, feed: dict[str, Any]) -> list[Any]:
        self.feeds.append(feed)
        sums = feed["a"].astype(np.int32) @ feed["b"].astype(np.int32)
        sums[31, 17] += self.error
        return [sums]


@pytest.mark.parametrize("error", [0, 1])
def test_wrong_sums_are_found_once_by_a_product_with_24_columns(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    session = Sums(error)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(int8_kernels, "open_session", lambda content, *, threads: session)
    monkeypatch.setattr(ort, "__version__", "1.23.0")
    expected = (
        "ONNX Runtime 1.23.0 gets sums of INT8 wrong on this processor: install onnxruntime 1.20, or 1.25 or newer"
    )
    assert [wrong_sums() for _ in range(3)] == [expected if error else ""] * 3
    ((activations, weights),) = (feed.values() for feed in session.feeds)
    assert (activations.shape, weights.shape) == ((64, 64), (64, 24))
    assert np.abs(weights.astype(int)).max() <= 64  # which do not saturate


def test_wrong_sums_concern_any_int8_of_onnx_runtime_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_kernels, "processor_saturates", lambda: False)
    monkeypatch.setattr(int8_kernels, "wrong_sums", lambda: "wrong")
    sets = ("x86-64", "x86-64-vnni", "aarch64", "wasm32")
    assert int8_fault(sets, runtime="onnxruntime") == int8_fault(sets[1:3], runtime="onnxruntime") == "wrong"
    assert int8_fault((), runtime="onnxruntime") == int8_fault(sets, runtime="openvino") == ""


def test_other_processors_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(int8_kernels, "open_session", None)
    assert not processor_saturates()
    assert not wrong_sums()


def test_the_product_is_an_onnx_file_that_runs_here() -> None:
    onnx.checker.check_model(onnx.load_from_string(int8_kernels.PRODUCT))
    feed = {"a": np.full((2, 3), 2, np.uint8), "b": np.full((3, 2), -5, np.int8)}
    (product,) = open_session(int8_kernels.PRODUCT).run(None, feed)
    assert product.tolist() == [[-30, -30], [-30, -30]]
    assert processor_saturates() in (False, True)


def test_asking_imports_no_onnx() -> None:
    code = (
        "import sys; from clip_rd_edge.runtime.backends.onnxruntime import processor_saturates as ask;"
        "assert 'onnxruntime' not in sys.modules; ask(); assert 'onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
