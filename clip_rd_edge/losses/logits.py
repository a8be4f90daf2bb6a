"""A B×B matrix of logits, whole or some of its rows and columns, as every term looks at it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Logits:
    """Logits L of a batch of B pairs, as seen from the pairs `start` to `start + b`: all B of them, or a block.

    Every term is a mean over pairs of something of a pair's row and of its column, so blocks add up to the whole. A
    block lets a process look at its own pairs alone, or work through a matrix that would not fit in memory.

    What several terms need of a matrix is computed once: a pass over B×B entries costs as much as a narrow product.

    Attributes:
        rows: L[start:start + b], (b, B).
        columns: Lᵀ[start:start + b], (b, B).
        own: each pair's logit with itself, (b,), computed apart: the gradient of a diagonal is a matrix of zeros.
        is_whole: `columns` is `rows` seen the other way round.
    """

    rows: Tensor
    columns: Tensor
    own: Tensor
    is_whole: bool

    @property
    def pairs(self) -> int:
        """B."""
        return self.rows.shape[1]

    @cached_property
    def row_normaliser(self) -> Tensor:
        """log Σ_j exp L_ij, (b,)."""
        with torch.enable_grad():  # whoever asks first may not want the gradient, but another will
            return torch.logsumexp(self.rows, dim=1)

    @cached_property
    def column_normaliser(self) -> Tensor:
        """log Σ_j exp Lᵀ_ij, (b,)."""
        with torch.enable_grad():
            return torch.logsumexp(self.columns, dim=1)

    @torch.no_grad()
    def row_distribution(self) -> Tensor:
        """Softmax of each row, (b, B), without graph."""
        return (self.rows - self.row_normaliser[:, None]).exp_()

    @torch.no_grad()
    def column_distribution(self) -> Tensor:
        """Softmax of each column, as rows, (b, B), without graph."""
        return (self.columns - self.column_normaliser[:, None]).exp_()


def product(one: Tensor, other: Tensor, block: slice | None) -> Logits:
    """one @ otherᵀ, whole, or as seen from a block of its pairs.

    Args:
        one, other: (B, D), the scale multiplied into one of them: it would be one more pass over the product.
    """
    if block is None:
        matrix = one @ other.T
        return Logits(matrix, matrix.T, (one * other).sum(dim=1), is_whole=True)
    own = (one[block] * other[block]).sum(dim=1)
    return Logits(one[block] @ other.T, other[block] @ one.T, own, is_whole=False)


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
