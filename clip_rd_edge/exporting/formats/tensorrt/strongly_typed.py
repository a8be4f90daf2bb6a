"""Strongly typed ONNX for TensorRT. In INT8, as many layers are quantised as the agreement with float32 allows."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.manifest import Manifest
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.formats.onnx import float32_note, fp16_tower, nodes_out_of_range, to_fp16
from clip_rd_edge.exporting.graph import prepare_for_quantization, weighted_layers
from clip_rd_edge.exporting.int8.ranges import measure_ranges
from clip_rd_edge.exporting.int8.rounding import RoundedLayers
from clip_rd_edge.exporting.int8.saturation import right_session
from clip_rd_edge.exporting.int8.search import TowerSamples
from clip_rd_edge.exporting.int8.sensitivity import SENSITIVITY_SAMPLES, robust_layers
from clip_rd_edge.exporting.int8.symmetric import MAX_LEVEL, quantize_symmetrically, quantized_inputs
from clip_rd_edge.exporting.options import Budget, ExportRequest
from clip_rd_edge.exporting.parity import Agreement, Inputs, agreement, embed, hard_inputs
from clip_rd_edge.runtime.backends.session import open_session
from clip_rd_edge.utils.reporting import SILENT, PrefixedReporter, Reporter


@dataclass(frozen=True)
class SymmetricTower:
    """A tower with symmetric Q/DQ.

    Attributes:
        model: with Q/DQ, in float16 otherwise.
        int8_layers: names of the layers in INT8.
        float_layers: names of the layers left in float for accuracy.
        agreement: with float32 on the held-out samples.
    """

    model: onnx.ModelProto
    int8_layers: tuple[str, ...]
    float_layers: tuple[str, ...]
    agreement: Agreement


def symmetric_tower(
    prepared: Path,
    samples: TowerSamples,
    *,
    min_agreement: float,
    keep_float32: Collection[str] = (),
    reporter: Reporter = SILENT,
) -> SymmetricTower | None:
    """Quantise every layer or, if that loses too much accuracy, all but the layers that lose most.

    The others are in float16 when the agreement is measured, as in the file that is shipped.

    Args:
        prepared: a float32 model that `quant_pre_process` has optimised.
        samples: inputs to set ranges by, and others to measure the agreement on.
        min_agreement: min centred cosine with float32.
        keep_float32: as for `to_fp16`.
        reporter: shows progress.

    Returns:
        The quantised tower, or None if no selection of layers reaches `min_agreement`.
    """
    model = onnx.load(prepared)
    all_layers = tuple(node.name for node in weighted_layers(model))
    ranges = measure_ranges(model, quantized_inputs(model), samples.calibrate)
    rounded = None
    if samples.adapt:
        reporter.update(f"rounding the weights of {len(all_layers)} layers")
        rounded = RoundedLayers(model, samples.calibrate, max_level=MAX_LEVEL)
    reference = embed(open_session(str(prepared)), samples.held_out)

    def quantize(layers: Sequence[str]) -> onnx.ModelProto:
        return quantize_symmetrically(model, ranges, layers=layers, rounded=rounded)

    def embed_int8(quantized: onnx.ModelProto, inputs: Inputs) -> Embeddings:
        content = quantized.SerializeToString()
        return embed(right_session(open_session(content), content), inputs)

    def attempt(layers: Sequence[str]) -> SymmetricTower:
        typed = to_fp16(quantize(layers), keep_float32=keep_float32)
        parity = agreement(reference, embed_int8(typed, samples.held_out))
        float_layers = tuple(name for name in all_layers if name not in layers)
        return SymmetricTower(typed, tuple(layers), float_layers, parity)

    full = attempt(all_layers)
    if full.agreement.centred_cosine >= min_agreement:
        return full
    reporter.update(f"measuring the INT8 error of {len(all_layers)} layers")
    subset = samples.calibrate[:SENSITIVITY_SAMPLES]

    def embed_with(layers: Sequence[str]) -> Embeddings:
        return embed_int8(quantize(layers), subset)

    of_subset = embed(open_session(str(prepared)), subset)
    for layers in robust_layers(all_layers, embed_with, of_subset, max_error=1 - min_agreement):
        if layers:
            partial = attempt(layers)
            if partial.agreement.centred_cosine >= min_agreement:
                return partial
    return None


_MEASURED = ", measured on this ONNX in ONNX Runtime, which on most CPUs computes float16 in float32."


@dataclass(frozen=True)
class TypedTower:
    """A tower's strongly typed ONNX.

    Attributes:
        content: of the ONNX file.
        precision, note: as in `bundle.manifest.Tower`.
        types: expected type of each Conv, MatMul and Gemm by node name, as TensorRT calls it.
    """

    content: bytes
    precision: str
    note: str = ""
    types: dict[str, str] = field(default_factory=dict)


def typed_towers(
    source: Path,
    manifest: Manifest,
    request: ExportRequest,
    *,
    calibration: CalibrationSet | None,
    reporter: Reporter = SILENT,
) -> dict[str, TypedTower]:
    """Convert both towers of the float32 bundle `source`.

    A tower that loses too much accuracy in INT8 is converted to float16, and its note says so.
    """
    inputs = hard_inputs(source, manifest)
    typed = {}
    for name, tower in manifest.towers.items():
        reporter.update(f"{name} tower: {request.precision}")
        model = source / tower.file
        if request.precision == "int8" and calibration is not None:
            calibrate, held_out = (
                samples.pixels if name == "image" else samples.ids
                for samples in (calibration.calibrate, calibration.held_out)
            )
            samples = TowerSamples(name, calibrate, held_out, adapt=request.adapts(name))
            typed[name] = _int8_tower(model, samples, inputs[name], request.budget, reporter)
        else:
            typed[name] = _float_tower(model, inputs[name], fp16=request.precision != "fp32")
    return typed


def _float_tower(model: Path, inputs: Inputs, *, fp16: bool, note: str = "") -> TypedTower:
    if fp16:
        tower = fp16_tower(model, inputs)
        if tower.model is not None:
            parity = f"Its centred cosine with float32 is {tower.agreement.centred_cosine:.5f}{_MEASURED}"
            types = _expected_types(onnx.load_from_string(tower.model), float32=tower.float32_nodes)
            return TypedTower(tower.model, "fp16", note or parity, types)
        note = float32_note(tower.agreement.centred_cosine)
    return TypedTower(model.read_bytes(), "fp32", note)


def _int8_tower(model: Path, samples: TowerSamples, inputs: Inputs, budget: Budget, reporter: Reporter) -> TypedTower:
    min_agreement = budget.min_agreement(samples.tower)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare_for_quantization(model, Path(scratch))
        float32_nodes = nodes_out_of_range(onnx.load(prepared), inputs)
        tower = symmetric_tower(
            prepared,
            samples,
            min_agreement=min_agreement,
            keep_float32=float32_nodes,
            reporter=PrefixedReporter(reporter, f"{samples.tower} tower: "),
        )
    if tower is None:
        note = f"fp16: INT8 does not reach a centred cosine of {min_agreement}."
        return _float_tower(model, inputs, fp16=True, note=note)
    in_float, total = len(tower.float_layers), len(tower.int8_layers) + len(tower.float_layers)
    return TypedTower(
        tower.model.SerializeToString(),
        f"int8 symmetric{f', {in_float} of {total} layers in FP16' if in_float else ''}",
        f"Its centred cosine with float32 is {tower.agreement.centred_cosine:.4f}{_MEASURED}",
        _expected_types(tower.model, int8=tower.int8_layers, float32=float32_nodes),
    )


def _expected_types(
    model: onnx.ModelProto, *, int8: Collection[str] = (), float32: Collection[str] = ()
) -> dict[str, str]:
    """Return the types of all Conv, MatMul and Gemm nodes; matrix products of two activations are in float16."""
    products = [node.name for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    return {name: "Int8" if name in int8 else "Half" for name in products if name not in float32 or name in int8}
