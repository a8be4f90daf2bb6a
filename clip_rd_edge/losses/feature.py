"""Feature distillation: the student's embeddings are to be the teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def feature_distillation(
    student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor
) -> Tensor:
    """FD of CLIP-KD (Yang et al. 2024): mean((s_v − t_v)²) + mean((s_t − t_t)²), means over all B·D entries.

    Args:
        student_image, student_text, teacher_image, teacher_text: embeddings, (B, D), L2-normalised.
    """
    return F.mse_loss(student_image, teacher_image) + F.mse_loss(student_text, teacher_text)
