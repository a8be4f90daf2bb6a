"""Convert a model's towers from PyTorch to LiteRT, in float32, by litert-torch."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from clip_rd_edge.bundle.manifest import Tower
from clip_rd_edge.errors import ClipRdEdgeError, MissingExtraError
from clip_rd_edge.exporting.formats.litert import LITERT
from clip_rd_edge.exporting.graph import silently
from clip_rd_edge.exporting.onnx import root_cause
from clip_rd_edge.exporting.parity import Inputs
from clip_rd_edge.exporting.towers import OTHER_FORMAT, TOWERS, Toolchain, on_cpu
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.litert import open_litert


class _NamedTower(nn.Module):
    """A tower whose output has a name; `formats.litert` finds its operators by the name of the attribute `tower`."""

    def __init__(self, tower: nn.Module, output: str) -> None:
        super().__init__()
        self.tower, self.output = tower, output

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        (rows,) = inputs.values()
        return {self.output: self.tower(rows)}


def require_litert_torch() -> None:
    """Raise MissingExtraError if litert-torch or what it needs here is not installed."""
    packages = {"litert_torch": "litert-torch", "ai_edge_quantizer": "ai-edge-quantizer"}
    for module, package in {**packages, "ai_edge_litert": "ai-edge-litert"}.items():
        if find_spec(module) is None:
            raise MissingExtraError(package, extra="litert-torch", purpose="Exporting for LiteRT")


def convert_tower(clip: ClipModel, name: str, tower: Tower, inputs: Inputs) -> bytes:
    """Return the content of a LiteRT file of the tower `name`, for one input like those of `inputs`.

    Args:
        tower: its ONNX file's entry, whose names of input and output are kept.
        inputs: (N, 3, H, W) float32 or (N, T) int64; LiteRT's file takes int32 ids.
    """
    with silently():  # it logs which of its optional parts are missing
        import litert_torch
        from litert_torch import progress

    example = torch.from_numpy(inputs[:1])
    if not example.is_floating_point():
        example = example.to(torch.int32)
    module = _NamedTower(TOWERS[name](clip.model), tower.output_name)
    progress.console.quiet = True
    try:
        with on_cpu(module):
            model = litert_torch.convert(module, sample_kwargs={tower.input_name: example})
            return bytes(model.model_content())
    except Exception as error:  # it raises many types, with the whole graph in their messages
        raise ClipRdEdgeError(
            f"litert-torch cannot convert the {name} tower of {clip.name}: {root_cause(error)}.", hint=OTHER_FORMAT
        ) from error


LITERT_TOOLS = Toolchain("LiteRT", LITERT, ".tflite", convert_tower, open_litert)
