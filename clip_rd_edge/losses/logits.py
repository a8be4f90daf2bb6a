"""A B×B matrix of logits, whole or some of its rows and columns, as every term looks at it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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
