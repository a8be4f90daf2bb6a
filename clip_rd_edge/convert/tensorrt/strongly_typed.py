"""A tower in TensorRT's INT8: as many layers as the agreement with float32 allows. Never imports torch."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import onnx

from clip_rd_edge.contract.bundle import Manifest
from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.convert.calibration import CalibrationSet
from clip_rd_edge.convert.fp16 import half_tower, overflowing, probes_of, to_fp16, why_float32
from clip_rd_edge.convert.graph import preprocessed
from clip_rd_edge.convert.int8.candidates import SENSITIVITY_SAMPLES, SENSITIVITY_SECONDS, SHARES
from clip_rd_edge.convert.int8.ranges import measure_ranges
from clip_rd_edge.convert.int8.search import TowerSamples
from clip_rd_edge.convert.int8.sensitivity import group_errors, layers_within
from clip_rd_edge.convert.int8.static import layers_of
from clip_rd_edge.convert.int8.symmetric import quantize_symmetrically, quantized_inputs
from clip_rd_edge.convert.options import Budget, ExportRequest
from clip_rd_edge.convert.parity import Agreement, Inputs, agreement, embed
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.reporting import SILENT, PrefixedReporter, Reporter


@dataclass(frozen=True)
class SymmetricTower:
    """A tower with symmetric Q/DQ.

    Attributes:
        model: in float32 around the Q/DQ.
        layers: those in INT8; of the others, `in_float`, accuracy asked to leave them.
        of: agreement with float32 on the samples that judge.
    """

    model: onnx.ModelProto
    layers: tuple[str, ...]
    in_float: tuple[str, ...]
    of: Agreement


def symmetric_tower(
    prepared: Path, *, calibrate: Inputs, judge: Inputs, min_agreement: float, reporter: Reporter = SILENT
) -> SymmetricTower | None:
    """Quantise every layer; where that costs too much, leave out the layers that it hurts most. None where none holds.

    Args:
        prepared: a float32 model that `quant_pre_process` has optimised.
        calibrate, judge: inputs to set ranges by, and others.
        min_agreement: least centred cosine with float32.
    """
    model = onnx.load(prepared)
    every = tuple(node.name for node in layers_of(model))
    ranges = measure_ranges(model, quantized_inputs(model), calibrate)
    reference = embed(open_session(str(prepared)), judge)

    def attempt(layers: Sequence[str]) -> SymmetricTower:
        quantized = quantize_symmetrically(model, ranges, layers=layers)
        of = agreement(reference, embed(open_session(quantized.SerializeToString()), judge))
        return SymmetricTower(quantized, tuple(layers), tuple(name for name in every if name not in layers), of)

    whole = attempt(every)
    if whole.of.centred_cosine >= min_agreement:
        return whole
    reporter.update(f"measuring what INT8 costs in each of {len(every)} layers")
    few = calibrate[:SENSITIVITY_SAMPLES]

    def embed_with(layers: Sequence[str]) -> Embeddings:
        return embed(open_session(quantize_symmetrically(model, ranges, layers=layers).SerializeToString()), few)

    errors = group_errors(every, embed_with, embed(open_session(str(prepared)), few), max_seconds=SENSITIVITY_SECONDS)
    for share in SHARES:
        if layers := layers_within(errors, share * (1 - min_agreement)):
            partly = attempt(layers)
            if partly.of.centred_cosine >= min_agreement:
                return partly
    return None


TypedPrecision = Literal["fp32", "fp16", "int8"]
_MEASURED = ", measured on this ONNX in ONNX Runtime."


@dataclass(frozen=True)
class TypedTower:
    """A tower's strongly typed ONNX.

    Attributes:
        content: the file's.
        precision, note: as `contract.bundle.Tower` has them.
        types: by the name of each Conv, MatMul and Gemm what it is to be computed in, in TensorRT's words.
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
    """Both towers of the float32 bundle `source`; one that INT8 costs too much is in float16, and its note says so."""
    probes = probes_of(source, manifest)
    made = {}
    for name, tower in manifest.towers.items():
        reporter.update(f"{name} tower: {request.precision}")
        model = source / tower.file
        if request.precision == "int8" and calibration is not None:
            calibrate, judge = (
                part.pixels if name == "image" else part.ids for part in (calibration.calibrate, calibration.judge)
            )
            samples = TowerSamples(name, calibrate, judge)
            made[name] = _int8(model, samples, probes[name], request.budget, reporter)
        else:
            made[name] = _float(model, probes[name], half=request.precision != "fp32")
    return made


def _float(model: Path, probes: Inputs, *, half: bool, note: str = "") -> TypedTower:
    if half:
        found = half_tower(model, probes)
        if found.model is not None:
            parity = f"Its centred cosine with float32 is {found.of.centred_cosine:.5f}{_MEASURED}"
            types = _types(onnx.load_from_string(found.model), in_float32=found.kept)
            return TypedTower(found.model, "fp16", note or parity, types)
        note = why_float32(found)
    return TypedTower(model.read_bytes(), "fp32", note)


def _int8(model: Path, samples: TowerSamples, probes: Inputs, budget: Budget, reporter: Reporter) -> TypedTower:
    least = budget.min_agreement(samples.tower)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = preprocessed(model, Path(scratch))
        found = symmetric_tower(
            prepared,
            calibrate=samples.calibrate,
            judge=samples.judge,
            min_agreement=least,
            reporter=PrefixedReporter(reporter, f"{samples.tower} tower: "),
        )
        if found is None:
            return _float(model, probes, half=True, note=f"fp16: INT8 does not reach a centred cosine of {least}.")
        kept = overflowing(onnx.load(prepared), probes)
    typed = to_fp16(found.model, keep=kept)
    left = (
        f", {len(found.in_float)} of {len(found.layers) + len(found.in_float)} layers in FP16" if found.in_float else ""
    )
    return TypedTower(
        typed.SerializeToString(),
        f"int8 symmetric{left}",
        f"Its centred cosine with float32 is {found.of.centred_cosine:.4f}{_MEASURED}",
        _types(typed, int8=found.layers, in_float32=kept),
    )


def _types(model: onnx.ModelProto, *, int8: Collection[str] = (), in_float32: Collection[str] = ()) -> dict[str, str]:
    """Types of all of a model's products; those of two activations, as in attention, are in float16."""
    products = [node.name for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    return {name: "Int8" if name in int8 else "Half" for name in products if name not in in_float32 or name in int8}
