"""A fast gradient for the weights of depthwise convolutions whose kernel is larger than the image.

oneDNN, which computes torch's convolutions on CPUs, has no fast kernel for that gradient, neither in float32 nor in
bfloat16, and takes 10 to 50 times as long as for the convolution itself (seen with torch 2.13 and 2.15). This is where
small images end up: at 64 pixels, the last kernels of EfficientNet, 5 × 5, slide over 4 × 4 and 2 × 2 pixels, and
a third of a step was spent there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_input
from torch.overrides import has_torch_function_unary

Pair = tuple[int, int]


def speed_up_small_maps(model: nn.Module) -> None:
    """Give depthwise convolutions of a model on a CPU this gradient, wherever the kernel is larger than the image.

    Parameters, outputs and names stay as they are. timm's layers that pad an image by its size are left out: what they
    pad is never smaller than the kernel. So are calls within a `TorchFunctionMode`, such as that of INT8 rounding.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_plain_depthwise(module):
            module.__class__ = _DepthwiseConvolution


def _is_plain_depthwise(module: nn.Conv2d) -> bool:
    is_depthwise = 1 < module.in_channels == module.out_channels == module.groups
    return is_depthwise and module.dilation == (1, 1) and module.padding_mode == "zeros" and module.padding != "same"


class _DepthwiseConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        is_small = any(edge > size for edge, size in zip(self.kernel_size, input.shape[-2:], strict=True))
        # A mode may compute something else than the convolution, whose gradient this is not.
        is_plain = input.dim() == 4 and not has_torch_function_unary(input)
        output: Tensor
        if is_small and is_plain and weight.requires_grad and torch.is_grad_enabled():
            padding = (0, 0) if isinstance(self.padding, str) else self.padding
            apply: Any = _SmallMapConvolution.apply  # typed from torch 2.15 on
            output = apply(input, weight, bias, self.stride, padding)
        else:
            output = super()._conv_forward(input, weight, bias)
        return output


class _SmallMapConvolution(Function):
    """conv2d, with the gradient of each weight as a product of what it sees with the output's gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.stride, ctx.padding = stride, padding
        return torch.conv2d(input, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        input, weight = ctx.saved_tensors
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            size, groups = input.shape, len(weight)
            weight = weight.to(gradient.dtype)  # autocast makes them differ
            of_input = conv2d_input(size, weight, gradient, ctx.stride, ctx.padding, groups=groups)  # type: ignore
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        dtype = torch.promote_types(gradient.dtype, torch.float32)  # of the sums
        of_weight = _of_weight(input.to(dtype), weight.to(dtype), gradient.to(dtype), ctx.stride, ctx.padding)
        return of_input, of_weight, of_bias, None, None


def _of_weight(input: Tensor, weight: Tensor, gradient: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """Return the gradient of the weights, (C, 1, kernel height, kernel width)."""
    result = torch.zeros_like(weight)
    rows, columns = (
        [
            _overlap(tap, input.shape[k], gradient.shape[k], stride[k - 2], padding[k - 2])
            for tap in range(weight.shape[k])
        ]
        for k in (2, 3)
    )
    for i, (out_rows, in_rows) in enumerate(rows):
        for j, (out_columns, in_columns) in enumerate(columns):
            seen = input[:, :, in_rows, in_columns]
            result[:, 0, i, j] = (gradient[:, :, out_rows, out_columns] * seen).sum((0, 2, 3))
    return result


def _overlap(tap: int, size: int, out_size: int, stride: int, padding: int) -> tuple[slice, slice]:
    """Return which outputs see a pixel through a weight of the kernel rather than padding, and which pixels these are.

    Output y sees pixel y · stride + tap - padding.
    """
    first = max(0, -(-(padding - tap) // stride))
    last = min(out_size - 1, (size - 1 + padding - tap) // stride)
    count = max(0, last - first + 1)
    start = first * stride + tap - padding if count else 0
    return slice(first, first + count), slice(start, start + (count - 1) * stride + 1 if count else 0, stride)


_CHANNELS = 16  # of the widest vectors


def take_strides_first(model: nn.Module) -> None:
    """Have strided 1 × 1 convolutions of few channels leave out pixels first, and then compute without a stride.

    With a stride, oneDNN's kernel for their weights' gradient writes past its memory (uxlfoundation/oneDNN#6035).
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_strided_point(module):
            module.__class__ = _PointConvolution


def _is_strided_point(module: nn.Conv2d) -> bool:
    is_point = module.kernel_size == (1, 1) != module.stride and module.padding in ((0, 0), "valid")
    return is_point and module.groups == 1 and module.in_channels < _CHANNELS


class _PointConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        down, right = self.stride
        return conv2d(input[..., ::down, ::right], weight, bias)
