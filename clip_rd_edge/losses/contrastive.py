"""Contrastive terms: every pair is to find itself in its row and in its column of a matrix of logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from clip_rd_edge.losses.logits import Logits


def symmetric_contrastive(logits: Logits) -> Tensor:
    """½ [CE(L) + CE(Lᵀ)], the InfoNCE loss of CLIP (Radford et al. 2021), a scalar.

    One function for every contrastive term, by what stands in `logits`:

    - task: γ_s s_v·s_t, the student alone
    - VRD's contrastive parts (CLIP-RD): a t_v·s_v for pictures, b t_t·s_t for texts
    """
    return (_find_own(logits.rows, logits) + _find_own(logits.columns, logits)) / 2


def interactive_contrastive(image_to_teacher: Logits, text_to_teacher: Logits) -> Tensor:
    """½ [CE(c s_v·t_t) + CE(c s_t·t_v)], ICL of CLIP-KD (Yang et al. 2024): the student's queries, the teacher's keys.

    Args:
        image_to_teacher: c s_v·t_t, a row a student picture.
        text_to_teacher: c s_t·t_v, a row a student text.
    """
    return (_find_own(image_to_teacher.rows, image_to_teacher) + _find_own(text_to_teacher.rows, text_to_teacher)) / 2


def _find_own(rows: Tensor, logits: Logits) -> Tensor:
    return F.cross_entropy(rows, logits.own(), reduction="sum") / logits.pairs
