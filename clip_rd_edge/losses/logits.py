"""A B×B matrix of logits, whole or some of its rows and columns, as every term looks at it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Logits:
    """Logits L of a batch of B pairs, as seen from the pairs `start` to `start + b`: all B of them, or a block.

    Every term is a mean over pairs of something of a pair's row and of its column, so blocks add up to the whole. A
    block lets a process look at its own pairs alone, or work through a matrix that would not fit in memory.

    Attributes:
        rows: L[start:start + b], (b, B).
        columns: Lᵀ[start:start + b], (b, B).
    """

    rows: Tensor
    columns: Tensor
    start: int = 0

    @property
    def transposed(self) -> Logits:
        """The same of Lᵀ."""
        return Logits(self.columns, self.rows, self.start)

    @property
    def pairs(self) -> int:
        """B."""
        return self.rows.shape[1]

    def own(self) -> Tensor:
        """For each row, the index of its own pair, (b,)."""
        return torch.arange(self.start, self.start + len(self.rows), device=self.rows.device)

    def detach(self) -> Logits:
        """The same without gradient, as a target."""
        return Logits(self.rows.detach(), self.columns.detach(), self.start)


def whole(logits: Tensor) -> Logits:
    """All of a matrix; the transpose is a view and costs nothing."""
    return Logits(logits, logits.T)
