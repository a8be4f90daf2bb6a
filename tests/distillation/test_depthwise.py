"""The gradient of depthwise convolutions on small maps: that of torch, and where it is used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import create_conv2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip_rd_edge.distillation.depthwise import speed_up_small_maps, take_strides_first


def is_fast(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == "_SmallMapConvolutionBackward"


def two_convolutions(kernel: int | tuple[int, int], channels: int = 4, **options: Any) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Return the same convolution as torch has it, and sped up."""
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, channels, kernel, **{"groups": channels} | options).double()
    fast = copy.deepcopy(plain)
    speed_up_small_maps(fast)
    return plain, fast


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((4, 4), (5, 5), (2, 2), (2, 2)),
        ((9, 2), (5, 5), (3, 1), (2, 3)),
        ((2, 3), (5, 5), (1, 1), (4, 4)),
    ],
)
def test_gradients_are_torchs(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    image = torch.randn((3, 4, *size), dtype=torch.double).requires_grad_()
    outputs, gradients = [], []
    for module in two_convolutions(kernel, stride=stride, padding=padding):
        output = module(image)
        weights = torch.randn(output.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        outputs.append(output)
        gradients.append(torch.autograd.grad(output, [image, *module.parameters()], weights))
        assert isinstance(module, nn.Conv2d)
        assert list(module.state_dict()) == ["weight", "bias"]
    assert [is_fast(output) for output in outputs] == [False, True]
    assert torch.equal(*outputs)
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)


def test_other_convolutions_stay_torchs() -> None:
    for options in ({"groups": 2}, {"dilation": 2, "padding": 4}, {"padding": "same"}, {"padding_mode": "circular"}):
        for module in two_convolutions(5, **{"padding": 2} | options):
            assert not is_fast(module(torch.zeros((1, 4, 2, 2), dtype=torch.double)))
    for pointwise in ({"padding": 1}, {"kernel_size": 3}, {"groups": 2}):
        convolution = nn.Conv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 1, "stride": 2} | pointwise)
        take_strides_first(convolution)
        assert type(convolution) is nn.Conv2d


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timms_layers_checkpointing_and_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = create_conv2d(4, 4, 5, stride=1, padding="same", depthwise=True)
    fast = copy.deepcopy(plain)
    speed_up_small_maps(fast)
    image = torch.randn(3, 4, 2, 2, requires_grad=True)
    gradients = []
    for module, kept in ((plain, True), (fast, True), (fast, False)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = module(image) if kept else checkpoint(module, image, use_reentrant=False)
        assert output.dtype == dtype
        gradients.append(torch.autograd.grad(output.sum(), [image, *module.parameters()]))
    for own, torchs, checkpointed in zip(gradients[1], gradients[0], gradients[2], strict=True):
        assert own.dtype == torchs.dtype == torch.float32
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5  # of the rounding of what they see
        torch.testing.assert_close(own, torchs, rtol=tolerance, atol=tolerance)
        assert torch.equal(own, checkpointed)


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"stride": (1, 3), "bias": False}, {"stride": 2, "padding": "valid"}]
)
def test_outputs_and_gradients_stay(options: dict[str, Any]) -> None:
    plain = nn.Conv2d(3, 5, 1, **options).double()
    other: Any = copy.deepcopy(plain)
    take_strides_first(other)
    assert type(other) is not nn.Conv2d
    assert list(other.state_dict()) == list(plain.state_dict())
    image = torch.randn((2, 3, 7, 6), dtype=torch.double, requires_grad=True)
    one, two = plain(image), other(image)
    torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(y.square().sum(), [image, *m.parameters()]) for y, m in ((one, plain), (two, other))
    ]
    for own, torchs in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(own, torchs, rtol=1e-12, atol=1e-12)
