"""Strided 1 × 1 convolutions: the same without oneDNN's kernel for them, which damages memory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clip_rd_edge.distillation.depthwise import take_strides_first

SCRIPT = Path(__file__).with_name("layouts.py")
FAMILIES = ("mobileone_s0", "repvgg_a0", "fastvit_t8", "fastvit_mci0")  # the last is the image tower of MobileCLIP2-S0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"stride": (1, 3), "bias": False}, {"stride": 2, "padding": "valid"}]
)
def test_outputs_and_gradients_stay(options: dict[str, Any], compiled: bool) -> None:
    plain = nn.Conv2d(3, 5, 1, **options).double()
    other: Any = copy.deepcopy(plain)
    take_strides_first(other)
    assert type(other) is not nn.Conv2d
    assert list(other.state_dict()) == list(plain.state_dict())
    call = torch.compile(other, backend="aot_eager", fullgraph=True) if compiled else other
    image = torch.randn((2, 3, 7, 6), dtype=torch.double, requires_grad=True)
    one, two = plain(image), call(image)
    torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(y.square().sum(), [image, *m.parameters()]) for y, m in ((one, plain), (two, other))
    ]
    for own, torchs in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(own, torchs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"stride": 1}, {"padding": 1}, {"kernel_size": 3}, {"in_channels": 16}, {"groups": 2}],
    ids=lambda options: next(iter(options)),
)
def test_other_convolutions_stay_torchs(options: dict[str, Any]) -> None:
    convolution = nn.Conv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 1, "stride": 2} | options)
    take_strides_first(convolution)
    assert type(convolution) is nn.Conv2d


@pytest.mark.parametrize("isa", ["DEFAULT", "AVX2"])
def test_a_family_is_trained_to_the_same_weights_in_both_layouts(isa: str) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    process = subprocess.run(
        [sys.executable, str(SCRIPT), *FAMILIES], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]  # -11 for a segmentation fault, -6 for a damaged heap
    for family, (difference, change) in zip(FAMILIES, json.loads(process.stdout), strict=True):
        assert difference < 1e-5 < 1e-4 < change, family
