"""Contrastive terms: the task of CLIP, and those whose keys are the teacher's embeddings. Notation: `losses.terms`."""

from __future__ import annotations

from torch import Tensor

from clip_rd_edge.losses.logits import Logits
from clip_rd_edge.losses.terms import Products, term


@term("task", needs={"pairs", "images"}, matches=True)
def task(p: Products) -> Tensor:
    """The InfoNCE loss of CLIP (Radford et al. 2021), ½ [CE(γ_s s_v·s_t) + CE(γ_s s_t·s_v)]."""
    return _both_ways(p.student())


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
