"""Feature distillation: the student's embeddings beside the teacher's."""

from __future__ import annotations

from torch import Tensor

from clip_rd_edge.losses.terms import Products, mean, term


@term("fd", needs={"teacher"})
def fd(p: Products) -> Tensor:
    """Feature distillation of CLIP-KD (Yang et al. 2024), mean((s_v − t_v)²) + mean((s_t − t_t)²) over B·D entries."""
    sides = ((p.p_v[p.rows], p.t_v[p.rows]), (p.p_t[p.rows], p.t_t[p.rows]))
    parts = [zip(p.parts(student), p.parts(teacher), strict=True) for student, teacher in sides]
    terms = [[(s - t).square().sum() / (p.pairs * s.shape[1]) for s, t in side] for side in parts]
    return mean(image + text for image, text in zip(*terms, strict=True))
