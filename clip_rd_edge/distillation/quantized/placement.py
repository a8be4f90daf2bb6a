"""Where the exporter's static Q/DQ will stand, found while a tower runs in PyTorch.

`exporters.static` quantises convolutions and products with weights, and what follows them entry by entry. The same rule
is applied here to torch's functions as they are called, so that a model needs neither other modules nor a traced graph:
its parameters, checkpoints and optimiser stay what they are. Batch norms become part of the convolution before them,
and ReLUs of the layer before them, as in the exported graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clip_rd_edge.distillation.quantized.fake_quant import Rounding

_T = Tensor
_CLAMPS = {F.relu, F.relu6, F.hardtanh, torch.relu, torch.relu_, _T.relu, _T.relu_}
_SIGMOIDS = {F.sigmoid, torch.sigmoid, _T.sigmoid, _T.sigmoid_}
_GATES: dict[Any, Callable[[Tensor], Tensor]] = {F.silu: torch.sigmoid, F.hardswish: F.hardsigmoid}  # x · gate(x)
_SUMS = {torch.add, _T.add, _T.add_, _T.__add__, _T.__radd__, _T.__iadd__}
_PRODUCTS = {torch.mul, _T.mul, _T.mul_, _T.__mul__, _T.__rmul__, _T.__imul__}
_MEANS = {torch.mean, _T.mean, F.adaptive_avg_pool2d}
_POOLS = {torch.max_pool2d, F.max_pool2d, F.avg_pool2d, torch._C._nn.avg_pool2d}


class Int8Placement(TorchFunctionMode):
    """While it is active, hands the numbers that INT8 will hold to `rounding`; for one call of one tower.

    Args:
        norms: the batch norm after a convolution, by `id` of the convolution's weights; see `models.folding`.
    """

    def __init__(self, rounding: Rounding, norms: Mapping[int, Norm]) -> None:
        super().__init__()
        self._rounding, self._norms = rounding, norms
        self._count = 0
        # By `id`; the tensors are kept, so that no id is given twice.
        self._given: dict[int, tuple[Tensor, int]] = {}  # what layers and their followers gave, and its range
        self._rounded: dict[int, tuple[Tensor, Tensor]] = {}  # what else a layer has read, and that rounded
        self._normed: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            return self._convolution(*args, **kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        if func is F.batch_norm and id(first) in self._normed:
            return first
        follower = self._follower(func, first, args, kwargs) if id(first) in self._given else None
        if follower is not None:
            return follower
        return func(*self._as_read(args), **{name: self._as_read(value) for name, value in kwargs.items()})

    def _convolution(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor:
        norm = self._norms.get(id(weight))
        if norm is not None:
            weight, bias = norm.folded_into(weight, bias)
        output = F.conv2d(self._read(input), self._rounding.weight(weight), bias, *rest, **more)
        output = self._give(output)
        if norm is not None:
            self._normed.add(id(output))
        return output

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        read, weight = self._read(input), self._rounding.weight(weight)
        if input.ndim == 2:  # Gemm, whose bias is INT32
            return self._give(F.linear(read, weight, bias))
        product = self._give(F.linear(read, weight))  # MatMul, and an Add whose bias is INT8
        return product if bias is None else self._give(product + self._rounding.constant(bias))

    def _follower(self, func: Any, first: Tensor, args: Any, kwargs: Any) -> Tensor | None:
        """What `func` gives where INT8 goes on through it, else None."""
        if func in _CLAMPS:
            number = self._given[id(first)][1]
            return self._give(func(*args, **{**kwargs, "inplace": False} if "inplace" in kwargs else kwargs), number)
        if func in _GATES:
            return self._give(first * self._give(_GATES[func](first)))
        if func in _SIGMOIDS or func is F.hardsigmoid:
            return self._give(F.hardsigmoid(first) if func is F.hardsigmoid else torch.sigmoid(first))
        if func in _MEANS:
            return self._give(func(*args, **kwargs))
        if func in _POOLS:
            number = self._given[id(first)][1]
            output = self._rounding.again(number, func(*args, **kwargs))
            self._given[id(output)] = (output, number)
            return output
        if func in _SUMS or func in _PRODUCTS:
            second = self._operand(args[1])
            if second is not None:
                return self._give(first + second if func in _SUMS else first * second)
        return None

    def _operand(self, other: Any) -> Any:
        """The other operand of a sum or product as INT8 holds it, or None where it is in float."""
        if isinstance(other, nn.Parameter):
            return self._rounding.constant(other)
        return other if not isinstance(other, Tensor) or id(other) in self._given else None

    def _give(self, output: Tensor, number: int | None = None) -> Tensor:
        """What a layer or a follower has given, rounded, in a range of its own or in that of what it became part of."""
        if number is None:
            number = self._next()
        output = self._rounding.activation(number, output)
        self._given[id(output)] = (output, number)
        return output

    def _read(self, value: Tensor) -> Tensor:
        """What a layer reads, rounded."""
        if id(value) in self._given:
            return value
        if id(value) not in self._rounded:
            rounded = self._rounding.activation(self._next(), value)
            self._rounded[id(value)] = (value, rounded)
            self._rounded[id(rounded)] = (rounded, rounded)
        return self._rounded[id(value)][1]

    def _as_read(self, value: Any) -> Any:
        """Arguments with each tensor that a layer has read replaced by what it read: the graph has it once."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._as_read(part) for part in value)
        return self._rounded[id(value)][1] if isinstance(value, Tensor) and id(value) in self._rounded else value

    def _next(self) -> int:
        self._count += 1
        return self._count - 1


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
