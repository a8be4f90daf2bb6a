"""B×B logits, whole or as a block of rows and columns, and the learned scales that multiply them."""

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
    """The rows and columns of the B×B logits L that belong to the pairs `start` to `start + b`: all B pairs or a block.

    Every term is a mean over pairs of a function of the pair's row and column, so the terms of blocks add up to that of
    the whole. With blocks, a process computes only its own pairs, and L never has to fit in memory.

    Quantities that several terms share are cached: a pass over B×B entries costs as much as a narrow matrix product.

    Attributes:
        rows: L[start:start + b], (b, B).
        columns: Lᵀ[start:start + b], (b, B).
        diagonal: the logits of matching pairs, (b,), computed separately: the gradient of a diagonal of L would be a
            B×B matrix of mostly zeros.
        is_whole: whether b = B, so that `columns` is the transpose of `rows`.
    """

    rows: Tensor
    columns: Tensor
    diagonal: Tensor
    is_whole: bool

    @property
    def pairs(self) -> int:
        """B, the batch size."""
        return self.rows.shape[1]

    @cached_property
    def row_logsumexp(self) -> Tensor:
        """log Σ_j exp L_ij, (b,)."""
        with torch.enable_grad():  # cached: the first caller may not need a gradient, a later one may
            return torch.logsumexp(self.rows, dim=1)

    @cached_property
    def column_logsumexp(self) -> Tensor:
        """log Σ_j exp Lᵀ_ij, (b,)."""
        with torch.enable_grad():
            return torch.logsumexp(self.columns, dim=1)

    @torch.no_grad()
    def row_distribution(self) -> Tensor:
        """Return the softmax of each row, (b, B), detached."""
        return (self.rows - self.row_logsumexp[:, None]).exp_()

    @torch.no_grad()
    def column_distribution(self) -> Tensor:
        """Return the softmax of each column as a row, (b, B), detached."""
        return (self.columns - self.column_logsumexp[:, None]).exp_()


def compute_logits(left: Tensor, right: Tensor, block: slice | None) -> Logits:
    """Return the logits left @ rightᵀ, whole or for a block of pairs.

    Args:
        left, right: (B, D); one of them is already multiplied by the scale, to save a pass over the B×B product.
        block: pairs `start` to `stop`, or None for all.
    """
    if block is None:
        matrix = left @ right.T
        return Logits(matrix, matrix.T, (left * right).sum(dim=1), is_whole=True)
    diagonal = (left[block] * right[block]).sum(dim=1)
    return Logits(left[block] @ right.T, right[block] @ left.T, diagonal, is_whole=False)


ScaleKind = Literal["bounded", "raw"]
# Initial scale of the published recipe: ln(1 / 0.07), used as the multiplier itself, not as its logarithm.
PUBLISHED_START = math.log(1 / 0.07)
MAX_SCALE = 100.0
# A float32 just below ln 100, so that the multiplier does not exceed 100.
_MAX_LOG = float(np.nextafter(np.float32(math.log(MAX_SCALE)), np.float32(0)))


class Scales(nn.Module):
    """The learned multipliers a (image), b (text) and c (cross).

    Args:
        kind: `bounded` learns the logarithm and clamps the multiplier to [1, 100], so that a scale can neither become
            negative nor diverge; `raw` learns the multiplier itself, as published.
        start: initial value of the multipliers.
    """

    def __init__(self, kind: ScaleKind = "bounded", *, start: float = PUBLISHED_START) -> None:
        super().__init__()
        self.kind = kind
        value = math.log(start) if kind == "bounded" else start
        self.image = nn.Parameter(torch.tensor(value))
        self.text = nn.Parameter(torch.tensor(value))
        self.cross = nn.Parameter(torch.tensor(value))

    def multiplier(self, parameter: Tensor) -> Tensor:
        """Return the multiplier for one of this module's parameters, a scalar."""
        if self.kind == "raw":
            return parameter
        # Straight-through: from torch 2.15 on, clamp has gradient 0 at the bounds, so a scale could never leave them.
        clamped = parameter.detach().clamp(0.0, _MAX_LOG)
        return (clamped + (parameter - parameter.detach())).exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp bounded parameters to their range; call after each optimiser step."""
        if self.kind == "bounded":
            for parameter in self.parameters():
                parameter.clamp_(0.0, _MAX_LOG)
