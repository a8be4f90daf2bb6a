"""The loss terms. B is the batch size, and embeddings are L2-normalised, (B, D) each:

s_v, s_t         image and text embeddings of the student
t_v, t_t         image and text embeddings of the teacher
X·Y              the B×B product X Yᵀ
γ_s, γ_t         logit scales of the student and the teacher
a, b, c          learned scales: image, text, cross
CE(L)            −(1/B) Σ_i log softmax(L_i)_i: cross-entropy of the rows of L, with the matching pair as the target
KL(T ‖ L)        (1/B) Σ_i Σ_j P_ij (log P_ij − log Q_ij), P and Q the row-wise softmax of T and L; no gradient to T
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clip_rd_edge.losses.logits import Logits


def symmetric_contrastive(logits: Logits) -> Tensor:
    """½ [CE(L) + CE(Lᵀ)], the InfoNCE loss of CLIP (Radford et al. 2021); a scalar.

    The logits L select the term:

    - task: L = γ_s s_v·s_t, so the term is ½ [CE(γ_s s_v·s_t) + CE(γ_s s_t·s_v)]
    - contrastive part of VRD for images (CLIP-RD): L = a t_v·s_v, so ½ [CE(a t_v·s_v) + CE(a s_v·t_v)]
    - contrastive part of VRD for texts (CLIP-RD): L = b t_t·s_t, so ½ [CE(b t_t·s_t) + CE(b s_t·t_t)]
    """
    return (_row_cross_entropy(logits) + _column_cross_entropy(logits)) / (2 * logits.pairs)


def interactive_contrastive(text_to_image: Logits, image_to_text: Logits) -> Tensor:
    """ICL, interactive contrastive learning of CLIP-KD (Yang et al. 2024): ½ [CE(c s_v·t_t) + CE(c s_t·t_v)]; a scalar.

    The student's embeddings are the queries, the teacher's the keys.

    Args:
        text_to_image: c t_t·s_v, whose columns are the rows of c s_v·t_t.
        image_to_text: c t_v·s_t, whose columns are the rows of c s_t·t_v.
    """
    return (_column_cross_entropy(text_to_image) + _column_cross_entropy(image_to_text)) / (2 * text_to_image.pairs)


def _row_cross_entropy(logits: Logits) -> Tensor:
    """Sum over rows of the cross-entropy with the matching pair as the target."""
    return (logits.row_logsumexp - logits.diagonal).sum()


def _column_cross_entropy(logits: Logits) -> Tensor:
    return (logits.column_logsumexp - logits.diagonal).sum()


def relation_divergence(target: Logits, logits: Logits) -> Tensor:
    """½ [KL(T ‖ L) + KL(Tᵀ ‖ Lᵀ)] for the target T and the logits L; a scalar. No gradient reaches T.

    T and L select the term:

    - HRD, horizontal relational distillation (CRD in CLIP-KD): T = γ_t t_v·t_t and L = γ_s s_v·s_t, so
      ½ [KL(γ_t t_v·t_t ‖ γ_s s_v·s_t) + KL(γ_t t_t·t_v ‖ γ_s s_t·s_v)]
    - VRD, vertical relational distillation (CLIP-RD): T = b t_t·s_t and L = a t_v·s_v, so
      ½ [KL(sg(b t_t·s_t) ‖ a t_v·s_v) + KL(sg(b s_t·t_t) ‖ a s_v·t_v)], where sg stops the gradient: the image side
      follows the text side
    """
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


def cross_relation_divergence(image_to_text: Logits, text_to_image: Logits) -> Tensor:
    """XRD, cross relational distillation of CLIP-RD; a scalar, where sg stops the gradient:

        ¼ [KL(sg B ‖ A) + KL(sg A ‖ B) + KL(sg Bᵀ ‖ Aᵀ) + KL(sg Aᵀ ‖ Bᵀ)]

    Args:
        image_to_text: A = c t_v·s_t.
        text_to_image: B = c t_t·s_v.
    """
    towards_text = relation_divergence(text_to_image, image_to_text)
    return (towards_text + relation_divergence(image_to_text, text_to_image)) / 2


def affinity_mimicking(target: Logits, logits: Logits) -> Tensor:
    """Affinity mimicking of TinyCLIP (Wu et al. 2023); a scalar:

        ½ [H(T, L) + H(Tᵀ, Lᵀ)],  H(T, L) = −(1/B) Σ_i Σ_j P_ij log Q_ij,  P = softmax(T), Q = softmax(L) over rows

    It equals HRD plus the entropy of the teacher, so its gradient is that of HRD.

    Args:
        target: T = γ_t t_v·t_t; no gradient reaches it.
        logits: L = γ_s s_v·s_t.
    """
    return relation_divergence(target, logits) + _entropy(target)


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


def feature_distillation(student: Tensor, teacher: Tensor, *, pairs: int) -> Tensor:
    """One half of FD, feature distillation of CLIP-KD (Yang et al. 2024): mean((s − t)²); a scalar.

    FD = mean((s_v − t_v)²) + mean((s_t − t_t)²) is the sum over images and texts; means are over all B·D entries.

    Args:
        student, teacher: embeddings of all B pairs or of a block of b pairs, (b, D), L2-normalised.
        pairs: B.
    """
    return (student - teacher).square().sum() / (pairs * student.shape[1])
