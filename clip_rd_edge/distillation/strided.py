"""A gradient of strided 1 × 1 convolutions that stays within its memory.

oneDNN, which computes torch's convolutions on CPUs, copies the pixels that such a convolution sees into a workspace
before it computes the gradient of the weights. In channels-last format it writes past the end of the workspace if there
are fewer channels than numbers in a vector, 8 with AVX2 and 16 with AVX-512 (uxlfoundation/oneDNN#6035; seen with torch
2.13, oneDNN 3.12): the process crashes, or the gradient or other memory is wrong without notice. The first layers of
MobileOne, RepVGG and FastViT, and so of MobileCLIP, are such convolutions.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import conv2d

_CHANNELS = 16  # of the widest vectors


def take_strides_first(model: nn.Module) -> None:
    """Have such convolutions of a model leave out pixels first, and then compute the same without a stride.

    Parameters, outputs, gradients and names stay as they are, and the time that a step takes.
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
