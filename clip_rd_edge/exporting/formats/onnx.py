"""ONNX for ONNX Runtime, and float32 models in float16, strongly typed: Casts set the type that each node computes in.

ONNX Runtime and TensorRT then use the same types, and no builder flag decides. LayerNorm, Softmax, sums, norms and the
final norm stay in float32, because their sums of squares and exponentials are the first to exceed float16's range.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from clip_rd_edge.bundle.manifest import Tower
from clip_rd_edge.exporting.formats import Converted, Format, Job
from clip_rd_edge.exporting.graph import (
    activation_batches,
    drop_unused_constants,
    file_content,
    float_tensors,
    norm_nodes,
    prepare_for_quantization,
)
from clip_rd_edge.exporting.parity import Agreement, Inputs, agreement, embed, measure
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.files import write_bytes

FP16_MAX = float(np.finfo(np.float16).max)  # 65504
_FP16_MIN = 2.0**-24  # the smallest that is not 0
# From this opset on, QuantizeLinear and DequantizeLinear take float16; its other changes since 18 are additions. Other
# models keep theirs: ONNX Runtime has no float16 AveragePool of opset 19 on Arm processors with FP16 arithmetic.
_QDQ_OPSET = 19
# Sums over an axis, open or inside a normalisation: they may exceed float16's range where input and output do not.
_FLOAT32_KINDS = frozenset(
    ("LayerNormalization", "Softmax", "LogSoftmax", "InstanceNormalization", "GroupNormalization", "LpNormalization",
     "RMSNormalization", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp")
)  # fmt: skip
# A mean sums its inputs first; it is kept in float32 where that sum is large.
_MEANS = frozenset(("ReduceMean", "GlobalAveragePool"))
# Nodes whose output type does not follow from their input types.
_OWN_TYPE = frozenset(("Cast", "CastLike", "Constant", "ConstantOfShape", "Range"))
# Nodes that only move values: they keep their input's type. (ONNX Runtime 1.32 crashes on a Transpose after a Cast.)
_MOVES = frozenset(("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Flatten", "Identity"))
# Nodes whose other inputs are sizes and scales, which keep their type.
_FIRST_INPUT_ONLY = frozenset(("Resize",))
# Activations on other images may be this many times larger than those observed.
_HEADROOM = 4.0
_BATCH_SIZE = 4


def to_fp16(model: onnx.ModelProto, *, keep_float32: Collection[str] = ()) -> onnx.ModelProto:
    """Return a copy of a float32 model that computes in float16; inputs and outputs of the graph stay float32.

    Args:
        model: float32, with or without Q/DQ, of opset 18 or later.
    """
    copy = onnx.shape_inference.infer_shapes(model)
    converter = _Converter(copy.graph, {*keep_float32, *norm_nodes(copy.graph)})
    nodes = [new for node in copy.graph.node for new in converter.convert(node)]
    nodes.extend(converter.restore_outputs(nodes))
    del copy.graph.node[:], copy.graph.value_info[:]  # value_info describes the old types
    copy.graph.node.extend(nodes)
    _replace_constants(copy.graph, converter.fp16_constants)
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in nodes):
        for opset in copy.opset_import:
            if opset.domain in ("", "ai.onnx"):
                opset.version = max(opset.version, _QDQ_OPSET)
    return copy


def nodes_out_of_range(model: onnx.ModelProto, samples: Inputs) -> list[str]:
    """Return the names of nodes that, on some inputs, read, write or sum values near or beyond float16's range.

    These are large values, and tensors that are 0 in float16 and not in float32, such as squares of small activations,
    or the constant that keeps a norm from dividing by 0. The values are those of the float32 model, because a runtime
    may compute float16 nodes in float32 and hide what becomes of them.
    """
    floats = float_tensors(model.graph)
    producers = {name: node.name for node in model.graph.node for name in node.output if name in floats}
    means = [node for node in model.graph.node if node.op_type in _MEANS and node.output[0] in producers]
    out_of_range, large_sums = set[str](), set[str]()
    for start, values in enumerate(activation_batches(model, list(producers), samples, batch_size=_BATCH_SIZE)):
        out_of_range.update(
            producer for name, producer in producers.items() if _is_large(values[name]) or _vanishes(values[name])
        )
        values[model.graph.input[0].name] = samples[start * _BATCH_SIZE : (start + 1) * _BATCH_SIZE]
        for node in means:
            mean: npt.NDArray[np.float32] = values[node.output[0]]
            if _is_large(mean * (values[node.input[0]].size / max(mean.size, 1))):
                large_sums.add(node.name)
    tensors = {name for name, producer in producers.items() if producer in out_of_range}
    constants = (tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT)
    tensors.update(tensor.name for tensor in constants if _vanishes(numpy_helper.to_array(tensor)))
    return [
        node.name
        for node in model.graph.node
        if node.name in large_sums or tensors.intersection([*node.input, *node.output])
    ]


def _is_large(value: npt.NDArray[np.float32]) -> bool:
    # Infinity is not an overflow: it is what a causal attention mask contains, and float16 can represent it.
    return bool((np.abs(value[np.isfinite(value)]) > FP16_MAX / _HEADROOM).any())


def _vanishes(value: npt.NDArray[np.float32]) -> bool:
    return bool(0 < np.abs(value).max(initial=0) < _FP16_MIN)


class _Converter:
    """Rewrites nodes in their order and keeps track of each tensor's type."""

    def __init__(self, graph: onnx.GraphProto, keep_float32: set[str]) -> None:
        self._outputs = {output.name for output in graph.output}
        self._keep_float32 = keep_float32
        self._constants = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self._floats = float_tensors(graph) | self._constants
        self._fp16: set[str] = set()
        self._casts: set[str] = set()
        self.fp16_constants: set[str] = set()  # constants that are needed in float16

    def convert(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        fp16 = node.op_type not in (_OWN_TYPE | _FLOAT32_KINDS) and node.name not in self._keep_float32
        if node.op_type in _MOVES:
            fp16 = fp16 and node.input[0] in (self._fp16 | self._constants)
        casts: list[onnx.NodeProto] = []
        count = 1 if node.op_type in _FIRST_INPUT_ONLY else len(node.input)
        for i, name in enumerate(node.input[:count]):
            if name in self._floats:
                node.input[i] = self._in_type(name, fp16, casts)
        if fp16:
            self._fp16.update(name for name in node.output if name in self._floats)
        return [*casts, node]

    def restore_outputs(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Return Casts to float32 for the graph outputs that have become float16."""
        changed = self._outputs & self._fp16
        for node in nodes:
            for names in (node.input, node.output):
                names[:] = [f"{name}/half" if name in changed else name for name in names]
        return [_cast(f"{name}/half", name, TensorProto.FLOAT) for name in sorted(changed)]

    def _in_type(self, name: str, fp16: bool, casts: list[onnx.NodeProto]) -> str:
        """Return the name of a tensor in float16 or float32, adding a Cast where it is needed."""
        if name in self._constants:
            if fp16:
                self.fp16_constants.add(name)
            return f"{name}/fp16" if fp16 else name
        if (name in self._fp16) == fp16:
            return name
        new = f"{name}/{'fp16' if fp16 else 'fp32'}"
        if new not in self._casts:
            self._casts.add(new)
            casts.append(_cast(name, new, TensorProto.FLOAT16 if fp16 else TensorProto.FLOAT))
        return new


def _cast(name: str, new: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], [new], name=f"cast to {new}", to=to)


def _replace_constants(graph: onnx.GraphProto, fp16_constants: Collection[str]) -> None:
    converted = []
    for tensor in graph.initializer:
        if tensor.name in fp16_constants:
            values = numpy_helper.to_array(tensor)
            # A mask of −3e38 would become −infinity, and a row of these NaN in the Softmax.
            clipped = np.where(np.isfinite(values), np.clip(values, -FP16_MAX, FP16_MAX), values)
            converted.append(numpy_helper.from_array(clipped.astype(np.float16), f"{tensor.name}/fp16"))
    drop_unused_constants(graph)
    graph.initializer.extend(converted)


# Rounding alone stays above this; a tower below it has overflowed somewhere.
MIN_AGREEMENT = 0.999


class Fp16Tower(NamedTuple):
    """A tower in float16; `model` is the file's content, or None if the tower has to stay in float32."""

    model: bytes | None
    agreement: Agreement


def fp16_tower(model: Path, inputs: Inputs) -> Fp16Tower:
    """Convert a float32 ONNX file to float16, unless that changes its embeddings of hard inputs."""
    with tempfile.TemporaryDirectory() as scratch:
        prepared = onnx.load(prepare_for_quantization(model, Path(scratch)))
    content = file_content(to_fp16(prepared, keep_float32=nodes_out_of_range(prepared, inputs)))
    parity = agreement(embed(open_session(str(model)), inputs), embed(open_session(content), inputs))
    return Fp16Tower(content if parity.centred_cosine >= MIN_AGREEMENT else None, parity)


class Onnx(Format):
    """ONNX for ONNX Runtime: the float32 source itself, or FP16 or INT8."""

    def convert(self, job: Job) -> Converted:
        if job.plan.precision == "int8":
            from clip_rd_edge.exporting.int8.search import ORT, write_int8  # which the others do not need

            return write_int8(job, ORT)
        if job.plan.precision == "fp16":
            return job.convert_towers(partial(write_fp16, job), doing="float16")
        for tower in job.manifest.towers.values():
            for path in job.source.glob(f"{tower.file}*"):  # with the weights in a file of their own, if they are
                shutil.copyfile(path, job.folder / path.name)
        return Converted(job.manifest)


def write_fp16(job: Job, name: str, tower: Tower) -> Tower:
    """Write one tower in float16; return its manifest entry.

    On a CPU, float16 only saves space: ONNX Runtime computes it in float32, and the casts take time. The tower's note
    has how much it took here.
    """
    fp32_file, fp16_file, threads = job.source / tower.file, job.folder / tower.file, job.plan.threads
    converted = fp16_tower(fp32_file, job.inputs[name])
    if converted.model is None:
        shutil.copyfile(fp32_file, fp16_file)
        return msgspec.structs.replace(tower, note=float32_note(converted.agreement.centred_cosine))
    write_bytes(fp16_file, converted.model)
    session, reference = (open_session(str(file), threads=threads) for file in (fp16_file, fp32_file))
    measured = measure(session, reference, job.inputs[name], threads=threads)
    note = ""
    if measured.speedup < 1:
        size_ratio = fp16_file.stat().st_size / fp32_file.stat().st_size
        note = (
            f"float16 is {size_ratio:.2f} of float32's size; on this CPU it takes {1 / measured.speedup:.2f} times as "
            "long, because ONNX Runtime computes it in float32: use it to save space, or on a GPU."
        )
    return msgspec.structs.replace(tower, precision="fp16", note=note, measured=measured)


def float32_note(centred_cosine: float) -> str:
    """Return in one sentence why a tower stays in float32; `centred_cosine` is its agreement in float16."""
    return (
        f"float32: in float16 its centred cosine with float32 is {centred_cosine:.4f} on extreme "
        f"images and texts, below {MIN_AGREEMENT}."
    )
