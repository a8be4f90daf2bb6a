"""Relational terms: how the images and texts of a batch relate to each other. Notation: `losses.terms`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clip_rd_edge.losses.logits import Logits
from clip_rd_edge.losses.terms import Products, mean, term


@term("hrd", needs={"teacher", "images"}, matches=True)
def hrd(p: Products) -> Tensor:
    """Horizontal relational distillation, ½ [KL(T ‖ L) + KL(Tᵀ ‖ Lᵀ)], T = γ_t t_v·t_t, L = γ_s s_v·s_t.

    It is the CRD of CLIP-KD.
    """
    return mean(relation_divergence(teacher, p.student()) for teacher in p.teachers())


@term("affinity", needs={"teacher", "images"}, matches=True)
def affinity(p: Products) -> Tensor:
    """Affinity mimicking of TinyCLIP (Wu et al. 2023), ½ [H(T, L) + H(Tᵀ, Lᵀ)], T = γ_t t_v·t_t, L = γ_s s_v·s_t.

    With H(T, L) = −(1/B) Σ_i Σ_j P_ij log Q_ij, it equals HRD plus the entropy of the teacher: its gradient is HRD's.
    """
    return mean(relation_divergence(teacher, p.student()) + _entropy(teacher) for teacher in p.teachers())


@term("vrd_kl", needs={"teacher", "pairs", "images"})
def vrd_kl(p: Products) -> Tensor:
    """Vertical relational distillation (CLIP-RD), ½ [KL(sg(b t_t·s_t) ‖ a t_v·s_v) + KL(sg(b s_t·t_t) ‖ a s_v·t_v)].

    The image side follows the text side.
    """
    return relation_divergence(p.text_to_text(), p.image_to_image())


@term("xrd", needs={"teacher", "pairs", "images"})
def xrd(p: Products) -> Tensor:
    """Cross relational distillation (CLIP-RD), ¼ [KL(sg B ‖ A) + KL(sg A ‖ B) + KL(sg Bᵀ ‖ Aᵀ) + KL(sg Aᵀ ‖ Bᵀ)].

    With A = c t_v·s_t and B = c t_t·s_v.
    """
    towards_text = relation_divergence(p.text_to_image(), p.image_to_text())
    return (towards_text + relation_divergence(p.image_to_text(), p.text_to_image())) / 2


def relation_divergence(target: Logits, logits: Logits) -> Tensor:
    """½ [KL(T ‖ L) + KL(Tᵀ ‖ Lᵀ)] for the target T and the logits L; a scalar. No gradient reaches T."""
    # KL = Σ P (log P − log Q) with log P = T − logsumexp T. As each row of P sums to 1, the logsumexps can be added
    # separately.
    rows, columns = target.row_distribution(), target.column_distribution()
    if target.is_whole:
        # Both directions weight the same entries T − L, so one pass is enough.
        expected = _expected_difference(rows.add_(columns.T), target.rows, logits.rows)
    else:
        expected = _expected_difference(rows, target.rows, logits.rows)
        expected = expected + _expected_difference(columns, target.columns, logits.columns)
    normalisers = logits.row_logsumexp - target.row_logsumexp.detach()
    normalisers = normalisers + logits.column_logsumexp - target.column_logsumexp.detach()
    return (expected + normalisers.sum()) / (2 * logits.pairs)


@torch.no_grad()
def _entropy(logits: Logits) -> Tensor:
    """½ [entropy of the row distributions + entropy of the column distributions], means over B."""
    rows = logits.row_logsumexp.sum() - (logits.row_distribution() * logits.rows).sum()
    columns = logits.column_logsumexp.sum() - (logits.column_distribution() * logits.columns).sum()
    return (rows + columns) / (2 * logits.pairs)


class _ExpectedDifference(torch.autograd.Function):
    """Σ P (T − L), with the gradient −P for L and none for P and T.

    Autograd would store T − L as well as P. Computing P·T and P·L separately would lose precision by cancellation.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, target: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return (target - logits).mul_(weights).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        (weights,) = ctx.saved_tensors
        return None, None, weights * -gradients[0]


def _expected_difference(weights: Tensor, target: Tensor, logits: Tensor) -> Tensor:
    apply: Any = _ExpectedDifference.apply  # only some versions of torch have types for it
    result: Tensor = apply(weights, target.detach(), logits)
    return result
