"""Feature distillation: the student's embeddings are to be the teacher's."""

from __future__ import annotations

from torch import Tensor


def feature_distillation(student: Tensor, teacher: Tensor, *, pairs: int) -> Tensor:
    """One half of FD of CLIP-KD (Yang et al. 2024): mean((s − t)²), the mean over all B·D entries; a scalar.

    FD is the sum of this for pictures and for texts.

    Args:
        student, teacher: embeddings of all B pairs or of a block of them, (b, D), L2-normalised.
        pairs: B.
    """
    return (student - teacher).square().sum() / (pairs * student.shape[1])
