"""Terms of other methods, for `suites/others.yaml` alone: `clip-rd-edge evidence run others --terms FILE`.

None is ahead of the default recipe (measurements/relations.md), so none is shipped. `dark` counts the steps of a run:
one that was interrupted has to be deleted and begun again.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from clip_rd_edge.losses.objective import relation_divergence
from clip_rd_edge.losses.terms import Logits, Products, compute_logits, mean, term

STEPS, LAST_WEIGHT = 330, -0.5  # of suites/others.yaml; the paper's abstract does not have its last weight
_steps = WeakKeyDictionary[nn.Module, int]()


@term("hrd_soft", needs={"teacher", "images"}, matches=True)
def hrd_soft(p: Products) -> Tensor:
    """HRD with the teacher's distribution at half its logit scale, that is at twice its temperature."""
    return _hrd_at(p, 0.5)


@term("hrd_sharp", needs={"teacher", "images"}, matches=True)
def hrd_sharp(p: Products) -> Tensor:
    """HRD with the teacher's distribution at twice its logit scale."""
    return _hrd_at(p, 2.0)


def _hrd_at(p: Products, factor: float) -> Tensor:
    """HRD with a scale of its own for the teacher, which MobileCLIP2 (Faghri et al. 2025) chooses for each teacher."""
    scaled = zip(p.teacher_scales, p.parts(p.t_v), p.parts(p.t_t), strict=True)
    teachers = (compute_logits(factor * scale * image, text, p._block) for scale, image, text in scaled)
    return mean(relation_divergence(teacher, p.student()) for teacher in teachers)


@term("dark", needs={"teacher", "images"}, matches=True)
def dark(p: Products) -> Tensor:
    """HRD whose part off the diagonal is annealed from weight 1 to LAST_WEIGHT along a cosine.

    DARK (Saeed et al. 2026, arXiv 2603.05421): the student first follows the teacher's similarities of pairs that do
    not match, then departs from them. −(1/2B) Σ_i [P_ii log Q_ii + w Σ_{j≠i} P_ij log Q_ij], and the same of columns.
    """
    step = _steps.get(p._scales, 0)
    if torch.is_grad_enabled():
        _steps[p._scales] = step + 1
    share = (1 + math.cos(math.pi * min(step / STEPS, 1))) / 2
    weight = LAST_WEIGHT + (1 - LAST_WEIGHT) * share
    return mean(_decomposed(teacher, p.student(), weight) for teacher in p.teachers())


def _decomposed(target: Logits, logits: Logits, weight: float) -> Tensor:
    total = logits.rows.new_zeros(())
    for wanted, entries, normaliser in (
        (target.row_distribution(), logits.rows, logits.row_logsumexp),
        (target.column_distribution(), logits.columns, logits.column_logsumexp),
    ):
        cross_entropy = -wanted * (entries - normaliser[:, None])  # whole batches alone: the pairs are on the diagonal
        diagonal = cross_entropy.diagonal().sum()
        total = total + diagonal + weight * (cross_entropy.sum() - diagonal)
    return total / (2 * logits.pairs)
