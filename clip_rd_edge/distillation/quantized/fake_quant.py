"""INT8's rounding in float32, as the exporter's static Q/DQ will round: U8 activations, S8 weights by output channel.

Gradients pass straight through the rounding (Jacob et al. 2018, arXiv:1712.05877), so that a tower can learn to live
with it; the operators are PyTorch's own.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from clip_rd_edge.convert.int8.ranges import without_outliers

_U8, _S8 = (0, 255), (-127, 127)  # ONNX Runtime leaves -128 out of symmetric ranges
_SMALLEST = 1e-12  # a scale of what is 0 always


class Rounding(Protocol):
    """What is done to the numbers that INT8 will hold."""

    def activation(self, number: int, values: Tensor) -> Tensor:
        """Activations with the range `number`; called again for a number, the last call counts."""
        ...

    def again(self, number: int, values: Tensor) -> Tensor:
        """Activations made from those of the range `number` that keep its scale, as pooling does."""
        ...

    def weight(self, values: Tensor) -> Tensor:
        """A layer's weights, (out, …)."""
        ...

    def constant(self, values: Tensor) -> Tensor:
        """What is added or multiplied entry by entry, such as a bias."""
        ...


class ActivationRanges:
    """Least and greatest value of each activation that INT8 will hold, (n,) each, in the order of computation."""

    def __init__(self) -> None:
        self.low, self.high = torch.zeros(0), torch.zeros(0)

    def state_dict(self) -> dict[str, Any]:
        """For a run's checkpoints."""
        return {"low": self.low, "high": self.high}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self.low, self.high = state["low"], state["high"]


class Watching:
    """Rounds nothing and takes down what values activations have."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}
        self._rows: list[dict[int, tuple[float, float]]] = []

    def activation(self, number: int, values: Tensor) -> Tensor:
        self._seen[number] = without_outliers(values.detach().float().cpu().numpy())
        return values

    def again(self, number: int, values: Tensor) -> Tensor:
        return values

    def weight(self, values: Tensor) -> Tensor:
        return values

    def constant(self, values: Tensor) -> Tensor:
        return values

    def end_batch(self) -> None:
        """A batch has gone through."""
        self._rows.append(self._seen)
        self._seen = {}

    def write_to(self, ranges: ActivationRanges) -> None:
        """The mean of the batches' percentiles, as the exporter takes it; 0 is in every range."""
        table = torch.tensor([[row[number] for number in range(len(row))] for row in self._rows])  # (batches, n, 2)
        low, high = table.mean(dim=0).unbind(dim=1)
        ranges.low, ranges.high = low.clamp(max=0), high.clamp(min=0)


class RoundingToInt8:
    """Rounds activations within given ranges, and weights by their own."""

    def __init__(self, ranges: ActivationRanges, device: torch.device) -> None:
        scales = ((ranges.high - ranges.low) / (_U8[1] - _U8[0])).clamp(min=_SMALLEST)
        zero_points = (-ranges.low / scales).round().clamp(*_U8).to(torch.int32)
        self._scales, self._zero_points = scales.to(device), zero_points.to(device)

    def activation(self, number: int, values: Tensor) -> Tensor:
        scale, zero_point = self._scales[number], self._zero_points[number]
        return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, *_U8)

    again = activation

    def weight(self, values: Tensor) -> Tensor:
        scales = _symmetric_scale(values.detach().flatten(1).abs().amax(dim=1))
        zero_points = torch.zeros_like(scales, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(values, scales, zero_points, 0, *_S8)

    def constant(self, values: Tensor) -> Tensor:
        scale = _symmetric_scale(values.detach().abs().amax())
        return torch.fake_quantize_per_tensor_affine(values, scale, torch.zeros_like(scale, dtype=torch.int32), *_S8)


def _symmetric_scale(largest: Tensor) -> Tensor:
    return (largest / _S8[1]).clamp(min=_SMALLEST)
