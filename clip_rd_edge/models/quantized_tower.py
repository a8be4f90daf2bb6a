"""An image tower that computes as its static INT8 version will."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from clip_rd_edge.models.fake_quant import ActivationRanges, RoundingToInt8, Watching
from clip_rd_edge.models.folding import norms_after_convolutions
from clip_rd_edge.models.int8_placement import Int8Placement


class QuantizedTower(nn.Module):
    """A tower with INT8's rounding at every place where the exporter's static Q/DQ will stand; no layer is left out.

    Args:
        tower: in evaluation mode, on the device that it is to run on; its parameters are this module's.
        ranges: of its activations; see `calibrate`.
        example: pixels (N, 3, H, W) of a picture or more, to see what follows what.

    Attributes:
        norms: what `Int8Placement` takes.
    """

    def __init__(self, tower: nn.Module, ranges: ActivationRanges, example: Tensor) -> None:
        super().__init__()
        self.tower, self.ranges = tower, ranges
        self.norms = norms_after_convolutions(tower, example.to(_device(tower)))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set `ranges` by what the tower's activations are in float32 on some batches of pixels, (N, 3, H, W) each."""
        watching = Watching()
        for pixels in batches:
            with Int8Placement(watching, self.norms):
                self.tower(pixels.to(_device(self.tower)))
            watching.end_batch()
        watching.write_to(self.ranges)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) to embeddings (N, D)."""
        with Int8Placement(RoundingToInt8(self.ranges, pixel_values.device), self.norms):
            embeddings: Tensor = self.tower(pixel_values)
        return embeddings


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
