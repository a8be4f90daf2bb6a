"""INT8 rounding in float32, as by the exporter's static Q/DQ: U8 activations and constants, 7-bit S8 weights per
output channel.

Gradients pass straight through the rounding (Jacob et al. 2018, arXiv:1712.05877), so a tower can adapt to it. The
operators are PyTorch's own.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from clip_rd_edge.exporting.int8.ranges import range_without_outliers, range_without_ties
from clip_rd_edge.exporting.int8.saturation import MAX_WEIGHT

_UINT8 = (0, 255)
_WEIGHT = (-MAX_WEIGHT[7], MAX_WEIGHT[7])  # as for every target whose processor is not known in advance
_MIN_SCALE = 1e-12  # for tensors that are always 0


class QuantizationHooks(Protocol):
    """Called with each tensor that INT8 will hold; returns the tensor to compute with instead."""

    def activation(self, index: int, values: Tensor) -> Tensor:
        """Process an activation with range `index`. If called again for an index, the last call counts."""
        ...

    def pooled(self, index: int, values: Tensor) -> Tensor:
        """Process an activation that keeps the scale of its input with range `index`, such as after pooling."""
        ...

    def weight(self, values: Tensor) -> Tensor:
        """Process a layer's weights, (out, …)."""
        ...

    def constant(self, values: Tensor) -> Tensor:
        """Process a constant that is added or multiplied elementwise, such as a bias."""
        ...


class ActivationRanges:
    """Min and max of each activation that INT8 will hold, (n,) each, in the order of computation."""

    def __init__(self) -> None:
        self.low, self.high = torch.zeros(0), torch.zeros(0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, for the run's checkpoints."""
        return {"low": self.low, "high": self.high}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self.low, self.high = state["low"], state["high"]


class RangeObserver:
    """Records the ranges of activations, and rounds nothing."""

    def __init__(self) -> None:
        self._batch: dict[int, tuple[float, float]] = {}
        self._batches: list[dict[int, tuple[float, float]]] = []

    def activation(self, index: int, values: Tensor) -> Tensor:
        self._batch[index] = range_without_outliers(values.detach().float().cpu().numpy())
        return values

    def pooled(self, index: int, values: Tensor) -> Tensor:
        return values

    def weight(self, values: Tensor) -> Tensor:
        return values

    def constant(self, values: Tensor) -> Tensor:
        return values

    def end_batch(self) -> None:
        """Finish a batch and start the next."""
        self._batches.append(self._batch)
        self._batch = {}

    def write_to(self, ranges: ActivationRanges) -> None:
        """Set `ranges` to the mean of the batches' percentiles, as the exporter does, extended to include 0."""
        table = torch.tensor([[row[index] for index in range(len(row))] for row in self._batches])  # (batches, n, 2)
        means = [range_without_ties(low, high) for low, high in table.mean(dim=0).tolist()]
        low, high = torch.tensor(means).unbind(dim=1)
        ranges.low, ranges.high = low.clamp(max=0), high.clamp(min=0)


class FakeQuantizer:
    """Rounds activations within given ranges, and weights within their own."""

    def __init__(self, ranges: ActivationRanges, device: torch.device) -> None:
        scales, zero_points = _affine(ranges.low, ranges.high)
        self._scales, self._zero_points = scales.to(device), zero_points.to(device)

    def activation(self, index: int, values: Tensor) -> Tensor:
        scale, zero_point = self._scales[index], self._zero_points[index]
        return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, *_UINT8)

    pooled = activation

    def weight(self, values: Tensor) -> Tensor:
        scales = (values.detach().flatten(1).abs().amax(dim=1) / _WEIGHT[1]).clamp(min=_MIN_SCALE)
        zero_points = torch.zeros_like(scales, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(values, scales, zero_points, 0, *_WEIGHT)

    def constant(self, values: Tensor) -> Tensor:
        scale, zero_point = _affine(values.detach().amin().clamp(max=0), values.detach().amax().clamp(min=0))
        return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, *_UINT8)


def _affine(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and zero points of U8 for ranges that include 0, of any shape."""
    scales = ((high - low) / (_UINT8[1] - _UINT8[0])).clamp(min=_MIN_SCALE)
    return scales, (-low / scales).round().clamp(*_UINT8).to(torch.int32)
