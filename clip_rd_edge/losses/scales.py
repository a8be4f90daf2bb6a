"""The learnable scales a, b, c that multiply the products of teacher and student embeddings."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

ScaleKind = Literal["bounded", "raw"]
# Where the published recipe starts: ln(1 / 0.07), used as the multiplier itself, not as its logarithm.
PUBLISHED_START = math.log(1 / 0.07)
MAX_SCALE = 100.0
# The greatest float32 not above ln 100: at the bound itself a parameter still gets its gradient.
_MAX_LOG = float(np.nextafter(np.float32(math.log(MAX_SCALE)), np.float32(0)))


class Scales(nn.Module):
    """Image scale a, text scale b, cross scale c, each a multiplier.

    Args:
        kind: `bounded` learns the logarithm and clamps the multiplier to [1, 100], so that a scale can neither turn
            negative nor run away; `raw` learns the multiplier itself, as published.
        start: the multipliers' first value.
    """

    def __init__(self, kind: ScaleKind = "bounded", *, start: float = PUBLISHED_START) -> None:
        super().__init__()
        self.kind = kind
        value = math.log(start) if kind == "bounded" else start
        self.image = nn.Parameter(torch.tensor(value))
        self.text = nn.Parameter(torch.tensor(value))
        self.cross = nn.Parameter(torch.tensor(value))

    def multiplier(self, parameter: Tensor) -> Tensor:
        """What a parameter of this module multiplies with, a scalar."""
        if self.kind == "raw":
            return parameter
        # Past clamp's own gradient, which is 0 at the bounds from torch 2.15 on: a scale there could not come back.
        bounded = parameter.detach().clamp(0.0, _MAX_LOG)
        return (bounded + (parameter - parameter.detach())).exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Pull bounded parameters back into their range; beyond it they would get no gradient to return by."""
        if self.kind == "bounded":
            for parameter in self.parameters():
                parameter.clamp_(0.0, _MAX_LOG)
