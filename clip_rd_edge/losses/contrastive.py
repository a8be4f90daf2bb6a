"""Contrastive terms: every pair is to find itself in its row and in its column of a matrix of logits."""

from __future__ import annotations

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
