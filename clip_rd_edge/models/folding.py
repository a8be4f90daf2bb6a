"""Batch norms as part of the convolutions before them, as in the exported graph, found while a tower runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Norm:
    """A batch norm that keeps its figures: y = (x − mean) / sqrt(variance + epsilon) · weight + bias."""

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor
    epsilon: float

    def folded_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights (out, …) and bias of the convolution that does both."""
        factor = self.weight * torch.rsqrt(self.variance + self.epsilon)
        shift = self.bias - self.mean * factor
        folded = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        return folded, shift if bias is None else shift + bias * factor


def norms_after_convolutions(tower: nn.Module, example: Tensor) -> dict[int, Norm]:
    """The batch norm that reads each convolution of a tower, by `id` of the convolution's weights."""
    finder = _NormFinder()
    with torch.no_grad(), finder:
        tower(example)
    return finder.norms


class _NormFinder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.norms: dict[int, Norm] = {}
        self._convolutions: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.conv2d:
            self._convolutions[id(output)] = (output, args[1])
        if func is F.batch_norm:
            names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if id(given["input"]) in self._convolutions:
                weight = self._convolutions[id(given["input"])][1]
                mean, variance, scale, bias = (given[name] for name in names[1:5])
                self.norms[id(weight)] = Norm(mean, variance, scale, bias, given.get("eps", 1e-5))
        return output
