"""INT8 weights that no processor saturates, and the instruction sets that the manifest names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import NOT_ADAPTED, float32_tower

from clip_rd_edge.bundle.manifest import INSTRUCTION_SETS, read_manifest
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.formats import tensorrt
from clip_rd_edge.exporting.formats.openvino import OPENVINO, nncf_is_installed
from clip_rd_edge.exporting.int8 import candidates, saturation
from clip_rd_edge.exporting.int8.candidates import Backend, Candidate, Float32Tower
from clip_rd_edge.exporting.int8.methods import StaticQuantizer
from clip_rd_edge.exporting.int8.saturation import MAX_WEIGHT, instruction_sets, max_weight
from clip_rd_edge.exporting.int8.search import ORT, quantize_tower
from clip_rd_edge.exporting.parity import NodeByNode
from clip_rd_edge.exporting.plan import Budget, Plan, WeightBits
from clip_rd_edge.runtime.backends import onnxruntime as int8_kernels
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.timing import Clock


def _candidates(
    backend: Backend, prepared: dict[str, Path], calibration: CalibrationSet, tower: str, bits: WeightBits
) -> Iterator[Candidate]:
    model = prepared[tower]
    # No time to look for the layers that lose most: those of all candidates are quantised by the same code.
    plan = Plan(weight_bits=bits, provenance={} if bits == 7 else NOT_ADAPTED)
    float32 = float32_tower(model.parent, tower, calibration, count=8, model=model, plan=plan, clock=Clock(0))
    return backend.candidates(float32)


def test_two_neighbouring_products_of_7_bit_weights_fit_16_bits() -> None:
    assert 2 * 255 * MAX_WEIGHT[7] <= np.iinfo(np.int16).max < 2 * 255 * MAX_WEIGHT[8]


@pytest.mark.parametrize(("backend", "tower"), [(ORT, "image"), (ORT, "text"), (OPENVINO, "text")])
def test_no_candidate_for_unknown_processors_can_saturate(
    backend: Backend, tower: str, prepared: dict[str, Path], calibration: CalibrationSet
) -> None:
    names = []
    for candidate in _candidates(backend, prepared, calibration, tower, 7):
        content = candidate.make()
        largest = max_weight(onnx.load_from_string(content))
        # The largest weight of a channel is on the last level, or nothing was quantised.
        assert largest in ((None, 64) if candidate.name == "token embeddings only" else (64,)), candidate.name
        assert instruction_sets(content) == (INSTRUCTION_SETS if largest else ())
        names.append(candidate.name)
    assert len(names) >= 2
    assert (backend is OPENVINO and nncf_is_installed()) == any(name.startswith("NNCF") for name in names)
    assert (tower == "text") == any("token embeddings" in name for name in names)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_8_bit_weights_hold_with_vnni_and_on_arm_alone(
    tower: str, prepared: dict[str, Path], calibration: CalibrationSet
) -> None:
    content = next(_candidates(ORT, prepared, calibration, tower, 8)).make()
    assert max_weight(onnx.load_from_string(content)) in (127, 128)
    assert instruction_sets(content) == ("x86-64-vnni", "aarch64")


# An export for processors that add in 32 bits, made on one that saturates.


class Saturated:
    """A session whose embeddings are noise, as where INT8 saturates."""

    def __init__(self, session: Any) -> None:
        self.get_inputs, self._run = session.get_inputs, session.run

    def run(self, names: Any, feed: Any) -> list[Any]:
        (embeddings,) = self._run(names, feed)
        return [np.random.default_rng(0).standard_normal(embeddings.shape).astype(np.float32)]


def _open_saturated(model: str | bytes, *, threads: int | None = None) -> Any:
    session = open_session(model, threads=threads)
    return session if isinstance(model, str) else Saturated(session)


@pytest.fixture
def saturating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the kernels of this processor saturate."""
    for module in (saturation, int8_kernels):
        monkeypatch.setattr(module, "processor_saturates", lambda: True)
    for module in (candidates, tensorrt):
        monkeypatch.setattr(module, "open_session", _open_saturated)


def _integer_product(weight: int) -> bytes:
    """An ONNX file that multiplies x (N, 64) uint8, whose zero point is 3, by S8 weights (64, 2) with zero point -1."""
    constants = {"w": np.full((64, 2), weight, np.int8), "x0": np.uint8(3), "w0": np.full(2, -1, np.int8)}
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "x0", "w0"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["N", 64])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["N", 2])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content


@pytest.mark.parametrize(
    ("saturates", "wrong", "weight", "replaced"),
    [(False, "", 127, False), (True, "", 64, False), (True, "", 127, True), (False, "wrong sums", 64, True)],
)
def test_a_session_is_replaced_only_where_the_processor_computes_it_wrongly(
    saturates: bool, wrong: str, weight: int, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (saturation, int8_kernels):
        monkeypatch.setattr(module, "processor_saturates", lambda: saturates)
        monkeypatch.setattr(module, "wrong_sums", lambda: wrong)
    session, content = object(), _integer_product(weight)
    assert (saturation.right_session(session, content) is not session) == replaced
    of_litert = {"runtime": "litert", "sets": lambda content: ("x86-64",)}
    assert saturation.right_session(session, b"no ONNX file", **of_litert) is session


def test_candidates_are_judged_by_what_their_files_say(
    saturating: None, fp32_bundle: Path, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_candidate(tower: Float32Tower) -> Iterator[Candidate]:
        quantizer = StaticQuantizer(tower.model, tower.calibrate, weight_bits=tower.plan.weight_bits)
        yield Candidate("static", lambda: quantizer.quantize("min-max", quantizer.layers))

    monkeypatch.setattr(
        "clip_rd_edge.exporting.parity.time_in_turn",
        lambda calls, **limits: {name: np.full(5, 3.0 if name == "float32" else 1.0) for name in calls},
    )
    tower = float32_tower(fp32_bundle, "image", calibration, plan=Plan(weight_bits=8, budget=Budget(image=0.9)))
    entry = read_manifest(fp32_bundle).image
    shipped = quantize_tower(tower, entry, replace(ORT, open=_open_saturated, candidates=one_candidate)).tower
    assert (shipped.precision, shipped.instruction_sets) == ("int8 static", ("x86-64-vnni", "aarch64"))
    assert shipped.measured is not None
    assert shipped.measured.centred_cosine > 0.9


def test_layers_are_robust_by_what_their_files_say(
    saturating: None, prepared: dict[str, Path], calibration: CalibrationSet
) -> None:
    model = prepared["image"]
    plan = Plan(weight_bits=8, budget=Budget(image=0.5), provenance=NOT_ADAPTED)
    tower = float32_tower(model.parent, "image", calibration, count=8, model=model, plan=plan)
    quantizer = StaticQuantizer(model, tower.calibrate, weight_bits=8)
    assert len(list(candidates.static_candidates(quantizer, tower))) == 2  # none with layers in float
    assert tensorrt.int8_tower(tower, tower.calibrate).precision == "int8 symmetric"  # all layers


def test_the_reference_answers_of_a_tower_are_computed_as_its_file_says(
    colour_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[bytes] = []
    monkeypatch.setattr("clip_rd_edge.runtime.backends.onnxruntime.processor_saturates", lambda: True)
    monkeypatch.setattr(
        "clip_rd_edge.exporting.int8.saturation.open_as_written",
        lambda content, *, threads: opened.append(content) or open_session(content, threads=threads),
    )
    manifest = read_manifest(colour_bundle)
    image = msgspec.structs.replace(manifest.image, instruction_sets=("x86-64-vnni", "aarch64"))
    encoder = NodeByNode(colour_bundle, msgspec.structs.replace(manifest, image=image))
    encoder.encode_texts(["red"])
    assert opened == []
    encoder.encode_pixels(np.ones((1, 3, 8, 8), np.float32))
    assert opened == [(colour_bundle / "image.onnx").read_bytes()]
    assert "wrong answers" not in caplog.text
