"""Engines built without a GPU, and what their layers compute in by the builder's own account."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from clip_rd_edge.contract.bundle import read_manifest
from clip_rd_edge.convert.calibration import CalibrationSet, Samples
from clip_rd_edge.convert.fp16 import half_tower, to_fp16
from clip_rd_edge.convert.graph import preprocessed
from clip_rd_edge.convert.int8.ranges import measure_ranges
from clip_rd_edge.convert.int8.static import layers_of
from clip_rd_edge.convert.int8.symmetric import quantize_symmetrically, quantized_inputs
from clip_rd_edge.convert.options import ExportRequest
from clip_rd_edge.convert.parity import hard_pixels
from clip_rd_edge.convert.targets import require_target
from clip_rd_edge.convert.tensorrt import engine as tensorrt
from clip_rd_edge.convert.tensorrt.engine import build_engine, kernels, layers_not_in
from clip_rd_edge.convert.tensorrt.strongly_typed import typed_towers
from clip_rd_edge.errors import ClipRdEdgeError, InputError, MissingExtraError
from clip_rd_edge.exporters.bundle import export_bundle
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.verify import verify_bundle

# A line of the log that TensorRT for RTX 1.7 writes, shortened.
_LOG = """Layers:
Name: __myl_Move_0, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [-1,3], Datatype: Float }], Constants: [], \
Outputs: [ { Name: q, Datatype: Int8 }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: conv]
Name: conv_1, LayerType: correlation, Inputs: [ { Name: q, Datatype: Int8 }, { Name: r, Datatype: Half }], \
Constants: [ { Name: w, Datatype: Int8 }], Outputs: [], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: conv]\
[ONNX Layer: relu]
Name: mha, LayerType: kgen, Inputs: [ { Name: a, Datatype: Half }], Constants: [], Outputs: [], TacticName: , \
StreamId: 0, Metadata: [ONNX Layer: softmax][ONNX Layer: product]
"""


def test_the_log_tells_what_a_layer_reads() -> None:
    found = {kernel.name: kernel for kernel in kernels(_LOG)}
    assert found["conv_1"].inputs == ("Int8", "Half")
    assert found["conv_1"].nodes == ("conv", "relu")
    assert layers_not_in(_LOG, {"conv": "Int8", "product": "Half"}) == {}
    # The kernel that quantises the convolution's input reads float: it does not count, the product itself does.
    assert layers_not_in(_LOG, {"conv": "Half", "product": "Int8", "gone": "Int8"}) == {
        "conv": ("Int8",),
        "product": ("Half",),
        "gone": (),
    }
    with pytest.raises(ClipRdEdgeError, match="names no layers"):
        kernels("nothing")


def test_an_unknown_target_lists_the_known_ones() -> None:
    assert require_target("sm86") == "sm86"
    with pytest.raises(InputError, match=r"no engine for 'sm87'; there are sm75 .*sm121.*jetson-orin") as raised:
        require_target("sm87")
    assert "Did you mean" in str(raised.value)
    with pytest.raises(InputError, match="An engine needs a target"):
        require_target(None)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(tensorrt.importlib, "import_module", absent)
    with pytest.raises(MissingExtraError) as raised:
        build_engine(b"", target="sm86")
    assert raised.value.hint == "pip install 'clip-rd-edge[rtx]'"


@pytest.fixture(scope="module")
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'clip-rd-edge[rtx]'")


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(("trunk", "target"), [("resnet10t", "sm86"), ("mobilevit_xxs", "sm89")])
def test_an_image_engine_computes_in_the_type_that_was_asked_for(
    trunk: str, target: str, image_tower: Callable[[str], tuple[ClipModel, Path]], tmp_path: Path
) -> None:
    clip, path = image_tower(trunk)
    prepared = onnx.load(preprocessed(path, tmp_path))
    pixels = hard_pixels(clip.preprocessing)
    half = half_tower(path, pixels)
    assert half.model is not None
    products = [node.name for node in prepared.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    engine = build_engine(half.model, target=target)
    assert layers_not_in(engine.log, dict.fromkeys(products, "Half")) == {}
    # In float32 the same check fails for every layer, so that it can fail.
    layers = [node.name for node in layers_of(prepared)]
    plain = build_engine(path.read_bytes(), target=target)
    assert len(layers_not_in(plain.log, dict.fromkeys(layers, "Half"))) == len(layers)
    assert len(engine.content) < 0.9 * len(plain.content)
    quantized = to_fp16(quantize_symmetrically(prepared, measure_ranges(prepared, quantized_inputs(prepared), pixels)))
    int8 = build_engine(quantized.SerializeToString(), target=target)
    assert layers_not_in(int8.log, dict.fromkeys(layers, "Int8")) == {}


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("target", ["sm86", "sm120"])
def test_a_text_engine_computes_in_int8(fp32_bundle: Path, calibration: CalibrationSet, target: str) -> None:
    manifest = read_manifest(fp32_bundle)
    typed = typed_towers(fp32_bundle, manifest, ExportRequest(precision="int8"), calibration=calibration)["text"]
    assert list(typed.types.values()).count("Int8") == 13
    assert layers_not_in(build_engine(typed.content, target=target).log, typed.types) == {}


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_a_bundle_has_its_engines_beside_their_onnx(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    bundle = tmp_path / "engines"
    manifest = export_bundle(
        student,
        bundle,
        ExportRequest(precision="int8", format="trt", target="sm89", labels=("cat",)),
        source=fp32_bundle,
        calibration=calibration,
    ).manifest
    assert manifest.target == "tensorrt-rtx sm89"
    assert (manifest.image.engine, manifest.text.engine) == ("image.engine", "text.engine")
    assert {"image.onnx", "image.engine", "text.onnx", "text.engine"} < set(manifest.files)
    assert manifest.image.precision.startswith("int8 symmetric")
    assert manifest.image.measured is None  # a latency of this machine would say nothing of the GPU's
    assert "Its centred cosine with float32 is 0.9" in manifest.image.note
    assert all(check.passed for check in verify_bundle(bundle))


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_what_the_parser_does_not_take_is_one_sentence() -> None:
    with pytest.raises(ClipRdEdgeError, match=r"^TensorRT for RTX [\d.]+ does not take the ONNX: ") as raised:
        build_engine(b"no onnx", target="sm86")
    assert "\n" not in str(raised.value)


def test_the_calibration_set_must_fit(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    small = Samples(calibration.judge.pixels[:, :, :8, :8], calibration.judge.ids)
    other = CalibrationSet("other", calibrate=small, judge=small)
    with pytest.raises(ClipRdEdgeError, match="The calibration set has pictures of"):
        export_bundle(
            student,
            tmp_path / "b",
            ExportRequest(precision="int8", format="trt", target="sm86"),
            source=fp32_bundle,
            calibration=other,
        )
    assert not (tmp_path / "b").exists()
