"""Convert a model's towers from PyTorch to ExecuTorch's XNNPACK backend, in float32."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from clip_rd_edge.contract.bundle import Tower
from clip_rd_edge.convert.parity import Inputs
from clip_rd_edge.errors import ClipRdEdgeError, MissingExtraError
from clip_rd_edge.exporters.executorch_encoder import open_executorch
from clip_rd_edge.exporters.onnx import root_cause
from clip_rd_edge.exporters.towers import OTHER_FORMAT, TOWERS, Toolchain, on_cpu
from clip_rd_edge.models.clip import ClipModel

EXECUTORCH = "executorch"
_SUFFIX = ".pte"


def require_executorch() -> None:
    """Raise MissingExtraError if ExecuTorch is not installed."""
    if find_spec("executorch") is None:
        raise MissingExtraError("executorch", extra="executorch", purpose="Exporting for ExecuTorch")


def convert_tower(clip: ClipModel, name: str, tower: Tower, inputs: Inputs) -> bytes:
    """Return the content of an ExecuTorch file of the tower `name`, for one input like those of `inputs`.

    Args:
        tower: its ONNX file's entry, whose names of input and output the file does not have.
        inputs: (N, 3, H, W) float32 or (N, T) int64.

    Raises:
        ClipRdEdgeError: ExecuTorch cannot convert the tower.
    """
    try:
        with on_cpu(TOWERS[name](clip.model)) as module:
            return _lowered(module, torch.from_numpy(inputs[:1]))
    except Exception as error:  # it raises many types
        raise ClipRdEdgeError(
            f"ExecuTorch cannot convert the {name} tower of {clip.name}: {root_cause(error)}.", hint=OTHER_FORMAT
        ) from error


def _lowered(module: nn.Module, example: Tensor) -> bytes:
    """Return the file of a module; what XNNPACK does not compute, ExecuTorch's own operators do."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(module, (example,), strict=False)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    return bytes(lowered.to_executorch().buffer)


EXECUTORCH_TOOLS = Toolchain("ExecuTorch", EXECUTORCH, _SUFFIX, convert_tower, open_executorch)
