from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.benchmarking.run import run_suite
from clip_rd_edge.benchmarking.suite import Suite, SuiteRow
from clip_rd_edge.contract.encoder import TowerEncoder
from clip_rd_edge.errors import ConfigError, MissingExtraError, UsageError
from clip_rd_edge.runtime.loading import Runtime, load


def test_without_the_package_the_extra_is_named(colour_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    encoder = load(colour_bundle, runtime="openvino")
    with pytest.raises(MissingExtraError) as raised:
        encoder.encode_texts(["red"])
    assert raised.value.hint == "pip install 'clip-rd-edge[openvino]'"


def test_an_unknown_runtime_is_refused_with_the_known_ones(colour_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"no runtime 'tflite'; there are onnxruntime, openvino"):
        load(colour_bundle, runtime="tflite")  # type: ignore[arg-type]


def test_it_does_what_onnxruntime_does(colour_bundle: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'clip-rd-edge[openvino]'")
    ours, theirs = load(colour_bundle, runtime="openvino", threads=1), load(colour_bundle)
    assert (ours.describe().runtime, theirs.describe().runtime) == ("openvino", "onnxruntime")
    noise = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in noise]
    np.testing.assert_allclose(ours.encode_images(pictures), theirs.encode_images(pictures), atol=1e-5)
    first = ours.encode_texts(["red", "green blue"])
    ours.encode_texts(["blue", "yellow"])
    np.testing.assert_allclose(first, theirs.encode_texts(["red", "green blue"]), atol=1e-5)  # and not overwritten


def test_a_damaged_file_is_one_sentence(colour_bundle: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'clip-rd-edge[openvino]'")
    (colour_bundle / "image.onnx").write_bytes(b"no onnx")
    with pytest.raises(ConfigError, match=r"^OpenVINO .* cannot run .*image\.onnx") as raised:
        load(colour_bundle, runtime="openvino").encode_images([Image.new("RGB", (8, 8))])
    assert "\n" not in str(raised.value)


def test_a_row_of_a_suite_may_name_the_runtime(colour_bundle: Path, colour_pictures: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'clip-rd-edge[openvino]'")
    table = colour_pictures / "pairs.csv"
    table.write_text("filepath,title\nred.png,red\ngreen.png,green\n")
    rows = (
        SuiteRow(label="ort", model=str(colour_bundle), role="exported"),
        SuiteRow(label="ov", model=str(colour_bundle), role="quantised", runtime="openvino"),
    )
    suite = Suite(name="two", rows=rows, tasks=(str(table),), rounds=5)

    def opened(spec: str, *, runtime: Runtime | None = None) -> TowerEncoder:
        return load(spec, threads=1, runtime=runtime)

    assert [row.description.runtime for row in run_suite(suite, opened).rows] == ["onnxruntime", "openvino"]
