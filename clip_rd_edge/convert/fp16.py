"""A float32 ONNX model in float16, strongly typed: what is computed in which type stands in the graph as Casts.

ONNX Runtime and TensorRT then agree on it, and no builder flag decides. LayerNorm, Softmax and the norm at the end stay
in float32, since their sums of squares and exponentials leave float16's range first. Never imports torch.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from clip_rd_edge.contract.bundle import TOKENIZER, Manifest, Tower
from clip_rd_edge.contract.encoder import in_batches
from clip_rd_edge.contract.tokenizer import Tokenizer
from clip_rd_edge.convert.bundle import open_source
from clip_rd_edge.convert.graph import float_tensors, preprocessed, with_outputs
from clip_rd_edge.convert.options import ExportRequest
from clip_rd_edge.convert.parity import (
    PROBES,
    Agreement,
    Inputs,
    Timer,
    agreement,
    embed,
    hard_pixels,
    latencies,
    measurement,
)
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.io import write_bytes
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.timing import time_in_turn

LARGEST = float(np.finfo(np.float16).max)  # 65504
# From this opset on QuantizeLinear and DequantizeLinear take float16; what else changed since 18 only adds to it.
OPSET = 19
_FLOAT32_KINDS = frozenset(
    ("LayerNormalization", "Softmax", "LogSoftmax", "InstanceNormalization", "GroupNormalization", "LpNormalization")
)
# What an L2 norm at the end of a tower is made of.
_NORM_KINDS = frozenset(("Div", "Expand", "Clip", "Max", "ReduceL2", "ReduceSumSquare", "Sqrt", "LpNormalization"))
# Nodes whose output's type does not follow from their inputs'.
_OWN_TYPE = frozenset(("Cast", "CastLike", "Constant", "ConstantOfShape", "Range"))
# Moved, not computed with: what is in float32 stays so. (ONNX Runtime 1.32 also crashes on a Transpose after a Cast.)
_MOVES = frozenset(("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Flatten", "Identity"))
# Where the other inputs are sizes and scales, which have a type of their own.
_FIRST_INPUT_ALONE = frozenset(("Resize",))
# Activations on other pictures may be this many times as large as those that were seen.
_HEADROOM = 4.0
_BATCH_SIZE = 4


def to_fp16(model: onnx.ModelProto, *, keep: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of a float32 model, computed in float16; inputs and outputs of the graph stay float32.

    Args:
        model: float32, with or without Q/DQ, of opset 18 or later.
        keep: names of nodes that stay in float32, such as `overflowing` finds.

    Raises:
        ClipRdEdgeError: the model has branches or loops, which no tower of a CLIP model needs.
    """
    copy = onnx.shape_inference.infer_shapes(model)
    for node in copy.graph.node:
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            raise ClipRdEdgeError(f"The node {node.name} ({node.op_type}) branches; it cannot be written in float16.")
    converter = _Converter(copy.graph, {*keep, *_norm_at_the_end(copy.graph)})
    nodes = [made for node in copy.graph.node for made in converter.convert(node)]
    nodes.extend(converter.restore_outputs(nodes))
    del copy.graph.node[:], copy.graph.value_info[:]  # value_info tells the types of before
    copy.graph.node.extend(nodes)
    _replace_constants(copy.graph, converter.halved)
    for opset in copy.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, OPSET)
    return copy


def overflowing(model: onnx.ModelProto, samples: Inputs) -> list[str]:
    """Names of nodes that make or read values which, on some inputs, come near or go past what float16 can hold.

    Asked of the float32 model, since a runtime may compute float16 nodes in float32 and hide an overflow.
    """
    floats = float_tensors(model.graph)
    made_by = {name: node.name for node in model.graph.node for name in node.output if name in floats}
    session = open_session(with_outputs(model, list(made_by)).SerializeToString())
    found: set[str] = set()
    for batch in in_batches(len(samples), _BATCH_SIZE):
        values = session.run(list(made_by), {session.get_inputs()[0].name: samples[batch]})
        found.update(made_by[name] for name, value in zip(made_by, values, strict=True) if _large(value))
    large = {name for name, maker in made_by.items() if maker in found}
    return [node.name for node in model.graph.node if large.intersection([*node.input, *node.output])]


def _large(value: npt.NDArray[np.float32]) -> bool:
    # Infinity is no overflow: the mask of a causal attention is made of it, and float16 has it, too.
    return bool((np.abs(value[np.isfinite(value)]) > LARGEST / _HEADROOM).any())


class _Converter:
    """Rewrites nodes in their order, keeping track of which tensor has which type."""

    def __init__(self, graph: onnx.GraphProto, keep: set[str]) -> None:
        self._outputs = {output.name for output in graph.output}
        self._keep = keep
        self._constants = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self._floats = float_tensors(graph) | self._constants
        self._half: set[str] = set()
        self._casts: set[str] = set()
        self.halved: set[str] = set()  # constants that are needed in float16

    def convert(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The node, and before it the Casts that its type asks for."""
        half = node.op_type not in (_OWN_TYPE | _FLOAT32_KINDS) and node.name not in self._keep
        if node.op_type in _MOVES:
            half = half and node.input[0] in (self._half | self._constants)
        casts: list[onnx.NodeProto] = []
        last = 1 if node.op_type in _FIRST_INPUT_ALONE else len(node.input)
        for i, name in enumerate(node.input[:last]):
            if name in self._floats:
                node.input[i] = self._as(name, half, casts)
        if half:
            self._half.update(name for name in node.output if name in self._floats)
        return [*casts, node]

    def restore_outputs(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Casts to float32 for outputs of the graph that have become float16."""
        changed = self._outputs & self._half
        for node in nodes:
            for names in (node.input, node.output):
                names[:] = [f"{name}/half" if name in changed else name for name in names]
        return [_cast(f"{name}/half", name, TensorProto.FLOAT) for name in sorted(changed)]

    def _as(self, name: str, half: bool, casts: list[onnx.NodeProto]) -> str:
        if name in self._constants:
            if half:
                self.halved.add(name)
            return f"{name}/fp16" if half else name
        if (name in self._half) == half:
            return name
        new = f"{name}/{'fp16' if half else 'fp32'}"
        if new not in self._casts:
            self._casts.add(new)
            casts.append(_cast(name, new, TensorProto.FLOAT16 if half else TensorProto.FLOAT))
        return new


def _cast(name: str, new: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], [new], name=f"cast to {new}", to=to)


def _norm_at_the_end(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes between the last layer and the outputs that make the norm."""
    made_by = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    waiting = [output.name for output in graph.output]
    while waiting:
        node = made_by.get(waiting.pop())
        if node is not None and node.op_type in _NORM_KINDS and node.name not in found:
            found.add(node.name)
            waiting.extend(node.input)
    return found


def _replace_constants(graph: onnx.GraphProto, halved: Collection[str]) -> None:
    """Constants in float16 beside or instead of those in float32, as they are used."""
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    halves = [
        numpy_helper.from_array(_half(numpy_helper.to_array(tensor)), f"{tensor.name}/fp16")
        for tensor in graph.initializer
        if tensor.name in halved
    ]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *halves])


def _half(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    # A mask of −3e38 would become −infinity, and a row of these NaN in the Softmax.
    limited = np.where(np.isfinite(values), np.clip(values, -LARGEST, LARGEST), values)
    return limited.astype(np.float16)


# Rounding alone costs less than this; what costs more has overflowed somewhere.
MIN_AGREEMENT = 0.999


@dataclass(frozen=True)
class HalfTower:
    """A tower in float16.

    Attributes:
        model: the file's content, or None where float32 is to be shipped.
        of: its agreement with float32 on hard inputs.
        kept: names of the nodes that stay in float32 because their values would overflow.
    """

    model: bytes | None
    of: Agreement
    kept: tuple[str, ...]


def probes_of(folder: Path, manifest: Manifest) -> dict[str, Inputs]:
    """Hard inputs of a bundle's image tower and text tower."""
    ids = Tokenizer(folder / TOKENIZER, manifest.tokenizer)(PROBES)
    return {"image": hard_pixels(manifest.preprocessing), "text": ids}


def half_tower(model: Path, probes: Inputs) -> HalfTower:
    """A float32 ONNX file in float16; float32 where that changes what it does on hard inputs.

    Args:
        model: the float32 file.
        probes: (N, 3, H, W) float32 or (N, T) int64, which reach the largest values that it will meet.
    """
    with tempfile.TemporaryDirectory() as scratch:
        prepared = onnx.load(preprocessed(model, Path(scratch)))
    keep = overflowing(prepared, probes)
    content = to_fp16(prepared, keep=keep).SerializeToString()
    reference = embed(open_session(str(model)), probes)
    found = agreement(reference, embed(open_session(content), probes))
    return HalfTower(content if found.centred_cosine >= MIN_AGREEMENT else None, found, tuple(keep))


def write_fp16(
    source: Path, folder: Path, request: ExportRequest, *, reporter: Reporter = SILENT, timer: Timer = time_in_turn
) -> Manifest:
    """Write the towers of the float32 bundle `source` in float16 into `folder`; return their manifest, not yet written.

    On a CPU float16 is for its size: ONNX Runtime computes it in float32, and the casts cost time. The tower's note
    says what it cost here.

    Raises:
        UsageError: `source` is no float32 bundle, or is damaged.
    """
    manifest = open_source(source, folder)
    probes = probes_of(source, manifest)
    towers = {}
    for name, tower in manifest.towers.items():
        reporter.update(f"{name} tower: float16")
        towers[name] = write_half(source, folder, tower, probes[name], threads=request.threads, timer=timer)
    return manifest.with_towers(towers)


def write_half(
    from_folder: Path, folder: Path, tower: Tower, probes: Inputs, *, threads: int, timer: Timer = time_in_turn
) -> Tower:
    """Write one tower of a float32 bundle in float16 into `folder`; returns it as the manifest has it."""
    source, target = from_folder / tower.file, folder / tower.file
    half = half_tower(source, probes)
    if half.model is None:
        shutil.copy2(source, target)
        return msgspec.structs.replace(tower, note=why_float32(half))
    write_bytes(target, half.model)
    sessions = {name: open_session(str(path), threads=threads) for name, path in (("fp32", source), ("fp16", target))}
    times = latencies(sessions, probes, timer=timer)
    measured = measurement(half.of, times["fp16"], reference=times["fp32"], threads=threads)
    note = ""
    if measured.speedup < 1:
        size = target.stat().st_size / source.stat().st_size
        note = (
            f"float16 at {size:.2f} of float32's size; on this CPU it takes {1 / measured.speedup:.2f} times as long, "
            "since ONNX Runtime computes it in float32: it is for its size and for GPUs."
        )
    return msgspec.structs.replace(tower, precision="fp16", note=note, measured=measured)


def why_float32(half: HalfTower) -> str:
    """Why a tower stays float32, in a sentence."""
    return (
        f"float32: in float16 its centred cosine with float32 is {half.of.centred_cosine:.4f} on pictures and texts of "
        f"extremes, below {MIN_AGREEMENT}."
    )
