"""The two towers of a model as ONNX files, float32, with a dynamic batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from clip_rd_edge.contract.bundle import IMAGE_MODEL, TEXT_MODEL
from clip_rd_edge.convert.graph import silently
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.models.clip import ClipModel, ImageTower, TextTower
from clip_rd_edge.utils.io import full_disk

OPSET = 18  # the exporter's own: it writes others by converting, and 17 is the least that has LayerNormalization
IMAGE_INPUT, IMAGE_OUTPUT = "pixel_values", "image_embedding"
# Not `embedding`: the text tower's token table has a node of that name.
TEXT_INPUT, TEXT_OUTPUT = "input_ids", "text_embedding"
# A batch of 1 would let the exporter take the batch for a constant.
_EXAMPLES = 2


def export_image_tower(clip: ClipModel, folder: Path) -> Path:
    """Write image.onnx: pixel_values (N, 3, H, W) float32 -> image_embedding (N, D), L2-normalised.

    Raises:
        ClipRdEdgeError: the exporter met an operator that ONNX has no counterpart of.
    """
    height, width = clip.preprocessing.size
    example = torch.zeros(_EXAMPLES, 3, height, width)
    return _export(ImageTower(clip.model), example, folder / IMAGE_MODEL, names=(IMAGE_INPUT, IMAGE_OUTPUT), clip=clip)


def export_text_tower(clip: ClipModel, folder: Path) -> Path:
    """Write text.onnx: input_ids (N, T) int64 -> text_embedding (N, D), L2-normalised; raises as the image tower's."""
    example = clip.tokenizer(["a photo"] * _EXAMPLES)
    return _export(TextTower(clip.model), example, folder / TEXT_MODEL, names=(TEXT_INPUT, TEXT_OUTPUT), clip=clip)


def _export(tower: nn.Module, example: Tensor, path: Path, *, names: tuple[str, str], clip: ClipModel) -> Path:
    example = example.to(next(tower.parameters()).device)
    try:
        with evaluating(tower), without_fast_path(), silently(), torch.no_grad():
            torch.onnx.export(
                tower,
                (example,),
                str(path),
                input_names=[names[0]],
                output_names=[names[1]],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                external_data=False,
                verbose=False,
            )
        model = onnx.load(path)
        slim(model)
        onnx.checker.check_model(model)
        onnx.save(model, path)
    except Exception as error:  # the exporter raises all kinds, whose reports are pages long
        if full := full_disk(error):
            raise full from error
        raise ClipRdEdgeError(
            f"The {path.stem} tower of {clip.name} cannot be exported to ONNX: {reason(error)}.",
            hint="choose a trunk among clip-rd-edge's presets, or a newer torch",
        ) from error
    return path


def reason(error: BaseException) -> str:
    """The first sentence of the error that the exporter's own errors hide."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each submodule in the mode it had: parts of a model may be frozen."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Without the fused attention that becomes `aten::_native_multi_head_attention`, which ONNX does not have."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def slim(model: onnx.ModelProto) -> None:
    """Change a float32 model in place; what it computes stays the same to the last bit."""
    forget_sources(model.graph)
    regroup_gelu(model.graph)


def forget_sources(graph: onnx.GraphProto) -> None:
    """Remove what the exporter notes of each part: the lines of Python that it came from, with the paths of this
    machine, which take up to a megabyte and are nobody's business on a device."""
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def regroup_gelu(graph: onnx.GraphProto) -> None:
    """Write GELU, x · (½ · (1 + erf)), as (x · (1 + erf)) · ½, which ONNX Runtime has one kernel for.

    Halving is exact, so that the values are the same; a text tower in INT8 takes 5 % less time.
    """
    made_by = {output: node for node in graph.node for output in node.output}
    halves = {tensor.name for tensor in graph.initializer if not tensor.dims and numpy_helper.to_array(tensor) == 0.5}
    for node in graph.node:
        for x, halved in (tuple(node.input), tuple(node.input)[::-1]) if node.op_type == "Mul" else ():
            inner = made_by.get(halved)
            if inner is None or inner.op_type != "Mul" or inner.input[0] not in halves:
                continue
            half, one_plus_erf = inner.input
            if _is_one_plus_erf(one_plus_erf, made_by):
                inner.input[:] = [x, one_plus_erf]
                node.input[:] = [halved, half]
                break


def _is_one_plus_erf(name: str, made_by: dict[str, onnx.NodeProto]) -> bool:
    add = made_by.get(name)
    erf = made_by.get(add.input[0]) if add is not None and add.op_type == "Add" else None
    return erf is not None and erf.op_type == "Erf"
