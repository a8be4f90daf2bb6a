"""ExecuTorch: towers from PyTorch for its XNNPACK backend, in float32 and in INT8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_rd_edge.bundle.manifest import Manifest, Tower
from clip_rd_edge.exporting.formats import Converted, Format, Job
from clip_rd_edge.exporting.int8.candidates import ONE_INPUT, Backend, Candidate, Float32Tower
from clip_rd_edge.exporting.int8.search import write_int8
from clip_rd_edge.exporting.parity import Inputs
from clip_rd_edge.exporting.towers import TOWERS, Toolchain, converting, from_own_float32, on_cpu, write_towers
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.one_input import ExecuTorchEncoder, open_executorch

EXECUTORCH = "executorch"
_PRODUCT = torch.ops.aten.linear.default
_CONVOLUTION = (torch.ops.aten.conv2d.default, torch.ops.aten.relu.default, torch.ops.aten.relu_.default)
_CALIBRATION_SAMPLES = 64  # each runs through PyTorch's graph with an observer at every operator


class ExecuTorch(Format):
    """ExecuTorch files, converted from PyTorch; INT8 is compared with ExecuTorch's own float32."""

    packages, extra = ("executorch", "torchao"), "executorch"

    def convert(self, job: Job) -> Converted:
        if job.plan.precision == "fp32":
            return write_towers(job, EXECUTORCH_TOOLS)
        with from_own_float32(job, EXECUTORCH_TOOLS) as own:
            return write_int8(own, executorch_backend(job.clip))

    def reference(self, folder: Path, manifest: Manifest) -> ExecuTorchEncoder:
        """Return ExecuTorch's encoder: it has no kernels beside those that compute the bundle."""
        return ExecuTorchEncoder(folder, manifest)


def convert_tower(clip: ClipModel, name: str, tower: Tower, inputs: Inputs) -> bytes:
    """Return the content of an ExecuTorch file of the tower `name`, for one input like those of `inputs`.

    Args:
        inputs: (N, 3, H, W) float32 or (N, T) int64.
    """
    with converting("ExecuTorch", name, clip), on_cpu(TOWERS[name](clip.model)) as module:
        return _lowered(module, torch.from_numpy(inputs[:1]))


def _lowered(module: nn.Module, example: Tensor) -> bytes:
    """Return the file of a module or a graph; what XNNPACK does not compute, ExecuTorch's own operators do."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(module, (example,), strict=False)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    return bytes(lowered.to_executorch().buffer)


def executorch_backend(clip: ClipModel) -> Backend:
    """Return what INT8 is searched with: candidates are quantised in PyTorch, not from the float32 file."""
    return Backend(EXECUTORCH, open_executorch, partial(_candidates, clip), **ONE_INPUT)


def _candidates(clip: ClipModel, tower: Float32Tower) -> Iterator[Candidate]:
    """Yield INT8 candidates for a tower.

    A tower with several convolutions is quantised statically: whole, without its matrix products, or in its
    convolutions alone. Any tower's matrix products are quantised dynamically.
    """
    make = partial(_quantized, clip, tower.name, tower.calibrate)
    layers = clip.model.get_submodule("visual").modules() if tower.name == "image" else ()
    if sum(isinstance(layer, nn.Conv2d) for layer in layers) > 1:
        yield Candidate("static", make)
        yield Candidate("static, matrix products in float", partial(make, keep=lambda node: node.target != _PRODUCT))
        yield Candidate("static in convolutions", partial(make, keep=_in_convolution))
    yield Candidate("dynamic", partial(make, dynamic=True))


def _in_convolution(node: torch.fx.Node) -> bool:
    """Return whether a node may be part of a convolution: the quantizer asks about its weights and its ReLU, too."""
    return node.op != "call_function" or node.target in _CONVOLUTION


def _quantized(
    clip: ClipModel, name: str, samples: Inputs, *, dynamic: bool = False, keep: Callable[[Any], bool] | None = None
) -> bytes:
    """Return the file of a tower in INT8, with a scale for each output channel of the weights.

    Args:
        samples: inputs that the ranges are measured on.
        dynamic: quantise matrix products only, each with the range of its input as it comes.
        keep: returns whether an operator is quantised; None quantises all that XNNPACK computes in INT8.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer()
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic))
    if keep is not None:
        quantizer.set_filter_function(keep)
    # Slices, because NumPy gives `row[None]` a stride of 0, and ExecuTorch does not lower an input with such a stride.
    rows = [torch.from_numpy(samples[i : i + 1]) for i in range(min(len(samples), _CALIBRATION_SAMPLES))]
    with on_cpu(TOWERS[name](clip.model)) as module:
        graph = prepare_pt2e(torch.export.export(module, (rows[0],), strict=False).module(), quantizer)
        for row in rows:
            graph(row)
        return _lowered(convert_pt2e(graph), rows[0])


EXECUTORCH_TOOLS = Toolchain("ExecuTorch", EXECUTORCH, ".pte", convert_tower, open_executorch)
