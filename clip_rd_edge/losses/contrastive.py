"""Contrastive terms: the task of CLIP, and those whose keys are the teacher's embeddings. Notation: `losses.terms`."""

from __future__ import annotations

from torch import Tensor, nn

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.losses.logits import Logits
from clip_rd_edge.losses.terms import Products, term


@term("task", needs={"pairs", "images"}, matches=True)
def task(p: Products) -> Tensor:
    """The InfoNCE loss of CLIP (Radford et al. 2021), ½ [CE(γ_s s_v·s_t) + CE(γ_s s_t·s_v)]."""
    return _both_ways(p.student())


@term("sigmoid", needs={"pairs", "images"}, matches=True)
def sigmoid(p: Products) -> Tensor:
    """The pairwise loss of SigLIP (Zhai et al. 2023), −(1/B) Σ_ij log σ(z_ij (γ_s s_v·s_t + β_s)_ij).

    z is 1 for an image and its own caption, and −1 for all others. It trains β_s, the student's bias, and each pair is
    scored by itself: a process needs the rows of its own images alone. Beside it, the terms of relations compare
    softmaxes of the cosines, each side at its own scale, in which a bias has no part.
    """
    if p.student_bias is None:
        raise ConfigError("The loss term sigmoid needs a student with a logit bias, as SigLIP's models have.")
    logits = p.student()
    # log σ(−x) = −softplus(x), and log σ(x) is x more.
    return (
        nn.functional.softplus(logits.rows + p.student_bias).sum() - (logits.diagonal + p.student_bias).sum()
    ) / p.pairs


@term("icl", needs={"teacher", "pairs", "images"})
def icl(p: Products) -> Tensor:
    """Interactive contrastive learning of CLIP-KD (Yang et al. 2024), ½ [CE(c s_v·t_t) + CE(c s_t·t_v)].

    The student's embeddings are the queries: the columns of c t_t·s_v are the rows of c s_v·t_t.
    """
    return (_columns(p.text_to_image()) + _columns(p.image_to_text())) / (2 * p.pairs)


@term("vrd_ce_image", needs={"teacher", "images"})
def vrd_ce_image(p: Products) -> Tensor:
    """The contrastive part of VRD for images (CLIP-RD), ½ [CE(a t_v·s_v) + CE(a s_v·t_v)]."""
    return _both_ways(p.image_to_image())


@term("vrd_ce_text", needs={"teacher"})
def vrd_ce_text(p: Products) -> Tensor:
    """The contrastive part of VRD for texts (CLIP-RD), ½ [CE(b t_t·s_t) + CE(b s_t·t_t)]."""
    return _both_ways(p.text_to_text())


def _both_ways(logits: Logits) -> Tensor:
    """½ [CE(L) + CE(Lᵀ)]."""
    return (_rows(logits) + _columns(logits)) / (2 * logits.pairs)


def _rows(logits: Logits) -> Tensor:
    """Sum over rows of the cross-entropy with the matching pair as the target."""
    return (logits.row_logsumexp - logits.diagonal).sum()


def _columns(logits: Logits) -> Tensor:
    return (logits.column_logsumexp - logits.diagonal).sum()
