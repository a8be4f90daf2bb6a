"""Contrastive terms: every pair is to find itself in its row and in its column of a matrix of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clip_rd_edge.losses.logits import Logits


def symmetric_contrastive(logits: Logits) -> Tensor:
    """½ [CE(L) + CE(Lᵀ)], the InfoNCE loss of CLIP (Radford et al. 2021), a scalar.

    One function for every contrastive term, by what stands in `logits`:

    - task: γ_s s_v·s_t, the student alone
    - VRD's contrastive parts (CLIP-RD): a t_v·s_v for pictures, b t_t·s_t for texts
    """
    return (_in_rows(logits) + _in_columns(logits)) / (2 * logits.pairs)


def interactive_contrastive(text_to_image: Logits, image_to_text: Logits) -> Tensor:
    """½ [CE(c s_v·t_t) + CE(c s_t·t_v)], ICL of CLIP-KD (Yang et al. 2024): the student's queries, the teacher's keys.

    Args:
        text_to_image: c t_t·s_v, whose columns are c s_v·t_t.
        image_to_text: c t_v·s_t, whose columns are c s_t·t_v.
    """
    return (_in_columns(text_to_image) + _in_columns(image_to_text)) / (2 * text_to_image.pairs)


def _in_rows(logits: Logits) -> Tensor:
    """Sum of the cross-entropies of rows against their own pair."""
    return (logits.row_normaliser - logits.own).sum()


def _in_columns(logits: Logits) -> Tensor:
    return (logits.column_normaliser - logits.own).sum()


def relation_divergence(target: Logits, logits: Logits) -> Tensor:
    """½ [KL(P ‖ Q) over rows + KL(Pᵀ ‖ Qᵀ) over columns], P from `target` and Q from `logits`, means over B; a scalar.

    No gradient reaches `target`. What stands in the two tells the term:

    - HRD, horizontal (CLIP-KD calls it CRD): target γ_t t_v·t_t, logits γ_s s_v·s_t
    - VRD, vertical (CLIP-RD): target b t_t·s_t, logits a t_v·s_v; the picture side follows the text side
    """
    # KL = Σ P (log P − log Q), and log P = T − log Σ exp T: the normalisers stand apart, as ΣP = 1 in each row.
    rows, columns = target.row_distribution(), target.column_distribution()
    if target.is_whole:
        # Both look at the same entries: one pass for the two.
        expected = _expected_difference(rows.add_(columns.T), target.rows, logits.rows)
    else:
        expected = _expected_difference(rows, target.rows, logits.rows)
        expected = expected + _expected_difference(columns, target.columns, logits.columns)
    normalisers = logits.row_normaliser - target.row_normaliser.detach()
    normalisers = normalisers + logits.column_normaliser - target.column_normaliser.detach()
    return (expected + normalisers.sum()) / (2 * logits.pairs)


def cross_relation_divergence(image_to_text: Logits, text_to_image: Logits) -> Tensor:
    """XRD of CLIP-RD: ¼ [KL(sg B ‖ A) + KL(sg A ‖ B) + KL(sg Bᵀ ‖ Aᵀ) + KL(sg Aᵀ ‖ Bᵀ)]; a scalar.

    Args:
        image_to_text: A = c t_v·s_t.
        text_to_image: B = c t_t·s_v.
    """
    towards_text = relation_divergence(text_to_image, image_to_text)
    return (towards_text + relation_divergence(image_to_text, text_to_image)) / 2


def affinity_mimicking(target: Logits, logits: Logits) -> Tensor:
    """½ [CE(P, Q) over rows + CE(Pᵀ, Qᵀ) over columns], affinity mimicking of TinyCLIP (Wu et al. 2023); a scalar.

    It is HRD and the teacher's entropy: the gradient is HRD's.

    Args:
        target: γ_t t_v·t_t; no gradient reaches it.
        logits: γ_s s_v·s_t.
    """
    return relation_divergence(target, logits) + _entropy(target)


@torch.no_grad()
def _entropy(logits: Logits) -> Tensor:
    """½ [H of rows + H of columns], means over B."""
    rows = logits.row_normaliser.sum() - (logits.row_distribution() * logits.rows).sum()
    columns = logits.column_normaliser.sum() - (logits.column_distribution() * logits.columns).sum()
    return (rows + columns) / (2 * logits.pairs)


class _ExpectedDifference(torch.autograd.Function):
    """Σ P (T − L), with −P as the gradient at L and none at P and T.

    Autograd would keep T − L beside P, and P·(T − L) as two large numbers would lose what they differ by.
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
    apply: Any = _ExpectedDifference.apply  # some versions of torch type it, others do not
    result: Tensor = apply(weights, target.detach(), logits)
    return result


def feature_distillation(student: Tensor, teacher: Tensor, *, pairs: int) -> Tensor:
    """One half of FD of CLIP-KD (Yang et al. 2024): mean((s − t)²), the mean over all B·D entries; a scalar.

    FD is the sum of this for pictures and for texts.

    Args:
        student, teacher: embeddings of all B pairs or of a block of them, (b, D), L2-normalised.
        pairs: B.
    """
    return (student - teacher).square().sum() / (pairs * student.shape[1])
