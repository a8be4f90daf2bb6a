"""Engines built without a GPU, and the types of their layers according to the builder's log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from clip_rd_edge.bundle.manifest import read_manifest
from clip_rd_edge.errors import ClipRdEdgeError, InputError, MissingExtraError
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.calibration import CalibrationSet, Samples
from clip_rd_edge.exporting.formats import tensorrt
from clip_rd_edge.exporting.formats.onnx import fp16_tower, to_fp16
from clip_rd_edge.exporting.formats.tensorrt import build_engine, mistyped_layers, parse_kernels, typed_towers
from clip_rd_edge.exporting.graph import prepare_for_quantization, weighted_layers
from clip_rd_edge.exporting.int8.methods import measure_ranges, quantize_symmetrically, quantized_inputs
from clip_rd_edge.exporting.parity import hard_pixels
from clip_rd_edge.exporting.plan import ExportRequest, require_target
from clip_rd_edge.installation import install_command
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.verify import verify_bundle

# Lines in the format of the log of TensorRT for RTX 1.7, shortened.
_LOG = """Layers:
Name: __myl_Move_0, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [-1,3], Datatype: Float }], Constants: [], \
Outputs: [ { Name: q, Datatype: Int8 }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: conv]
Name: conv_1, LayerType: correlation, Inputs: [ { Name: q, Datatype: Int8 }, { Name: r, Datatype: Half }], \
Constants: [ { Name: w, Datatype: Int8 }], Outputs: [], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: conv]\
[ONNX Layer: relu]
Name: mha, LayerType: kgen, Inputs: [ { Name: a, Datatype: Half }], Constants: [], Outputs: [], TacticName: , \
StreamId: 0, Metadata: [ONNX Layer: softmax][ONNX Layer: product]
"""


def test_the_log_lists_the_input_types_of_layers() -> None:
    kernels = {kernel.name: kernel for kernel in parse_kernels(_LOG)}
    assert kernels["conv_1"].inputs == ("Int8", "Half")
    assert kernels["conv_1"].nodes == ("conv", "relu")
    assert mistyped_layers(_LOG, {"conv": "Int8", "product": "Half"}) == {}
    # The kernel that quantises the convolution's input reads float; only the convolution's own kernel counts.
    assert mistyped_layers(_LOG, {"conv": "Half", "product": "Int8", "gone": "Int8"}) == {
        "conv": ("Int8",),
        "product": ("Half",),
        "gone": (),
    }
    with pytest.raises(ClipRdEdgeError, match="lists no layers"):
        parse_kernels("nothing")


def test_the_error_for_an_unknown_target_lists_the_known_ones() -> None:
    assert require_target("sm86") == "sm86"
    with pytest.raises(
        InputError, match=r"cannot be built for 'sm87'; expected one of sm75 .*sm121.*jetson-orin"
    ) as raised:
        require_target("sm87")
    assert "Did you mean" in str(raised.value)
    with pytest.raises(InputError, match="An engine needs a target"):
        require_target(None)


def test_the_error_for_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(tensorrt.importlib, "import_module", not_installed)
    with pytest.raises(MissingExtraError) as raised:
        build_engine(b"", target="sm86")
    assert raised.value.hint == install_command("rtx")


@pytest.fixture(scope="module")
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra rtx")


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(("trunk", "target"), [("resnet10t", "sm86"), ("mobilevit_xxs", "sm89")])
def test_an_image_engine_computes_in_the_requested_type(
    trunk: str, target: str, image_tower: Callable[[str], tuple[ClipModel, Path]], tmp_path: Path
) -> None:
    clip, path = image_tower(trunk)
    prepared = onnx.load(prepare_for_quantization(path, tmp_path))
    pixels = hard_pixels(clip.preprocessing)
    tower = fp16_tower(path, pixels)
    assert tower.model is not None
    products = [node.name for node in prepared.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    engine = build_engine(tower.model, target=target)
    assert mistyped_layers(engine.log, dict.fromkeys(products, "Half")) == {}
    # In float32, the same check reports every layer, which shows that it can fail.
    layers = [node.name for node in weighted_layers(prepared)]
    fp32 = build_engine(path.read_bytes(), target=target)
    assert len(mistyped_layers(fp32.log, dict.fromkeys(layers, "Half"))) == len(layers)
    assert len(engine.content) < 0.9 * len(fp32.content)
    quantized = to_fp16(quantize_symmetrically(prepared, measure_ranges(prepared, quantized_inputs(prepared), pixels)))
    int8 = build_engine(quantized.SerializeToString(), target=target)
    assert mistyped_layers(int8.log, dict.fromkeys(layers, "Int8")) == {}


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("target", ["sm86", "sm120"])
def test_a_text_engine_computes_in_int8(fp32_bundle: Path, calibration: CalibrationSet, target: str) -> None:
    manifest = read_manifest(fp32_bundle)
    typed = typed_towers(fp32_bundle, manifest, ExportRequest(precision="int8"), calibration=calibration)["text"]
    assert list(typed.types.values()).count("Int8") == 13
    assert mistyped_layers(build_engine(typed.content, target=target).log, typed.types) == {}


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_a_bundle_holds_engines_and_their_onnx_files(
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
    assert manifest.image.measured is None  # this machine's latency would not be the GPU's
    assert "Its centred cosine with float32 is 0.9" in manifest.image.note
    assert all(check.passed for check in verify_bundle(bundle, device="cpu"))


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_a_parser_error_is_one_sentence() -> None:
    with pytest.raises(ClipRdEdgeError, match=r"^TensorRT for RTX [\d.]+ cannot parse the ONNX: ") as raised:
        build_engine(b"no onnx", target="sm86")
    assert "\n" not in str(raised.value)


def test_the_calibration_set_must_match_the_model(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    small = Samples(calibration.held_out.pixels[:, :, :8, :8], calibration.held_out.ids)
    other = CalibrationSet("other", calibrate=small, held_out=small)
    with pytest.raises(ClipRdEdgeError, match="The calibration set has images of size"):
        export_bundle(
            student,
            tmp_path / "b",
            ExportRequest(precision="int8", format="trt", target="sm86"),
            source=fp32_bundle,
            calibration=other,
        )
    assert not (tmp_path / "b").exists()
