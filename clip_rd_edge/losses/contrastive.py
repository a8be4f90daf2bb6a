"""Contrastive terms: each row of a B×B matrix of logits is to find its own pair on the diagonal.

Shapes: L (B, B), logits; row i and column i belong to pair i.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def symmetric_contrastive(logits: Tensor) -> Tensor:
    """½ [CE(L) + CE(Lᵀ)], the InfoNCE loss of CLIP (Radford et al. 2021), a scalar.

    One function for every contrastive term, by what stands in `logits`:

    - task: γ_s s_v·s_t, the student alone
    - ICL, interactive contrastive (CLIP-KD, Yang et al. 2024): see `interactive_contrastive`
    - VRD's contrastive parts (CLIP-RD): a t_v·s_v for pictures, b t_t·s_t for texts
    """
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def interactive_contrastive(image_to_teacher: Tensor, text_to_teacher: Tensor) -> Tensor:
    """½ [CE(c s_v·t_t) + CE(c s_t·t_v)], ICL of CLIP-KD (Yang et al. 2024): the student's queries, the teacher's keys.

    Args:
        image_to_teacher: c s_v·t_t, (B, B), a row a student picture.
        text_to_teacher: c s_t·t_v, (B, B), a row a student text.
    """
    target = torch.arange(len(image_to_teacher), device=image_to_teacher.device)
    return (F.cross_entropy(image_to_teacher, target) + F.cross_entropy(text_to_teacher, target)) / 2
