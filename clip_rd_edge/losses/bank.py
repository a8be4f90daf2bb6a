"""Relations to a bank of the teacher's embeddings, which a batch alone does not show.

The other terms compare B pairs with each other. This one compares how student and teacher relate each pair to K images
V and K' captions T that the teacher has embedded, (K, D) and (K', D), such as all of the data set:

    ¼ [KL(γ t_v·V ‖ γ s_v·V) + KL(γ t_v·T ‖ γ s_v·T) + KL(γ t_t·V ‖ γ s_t·V) + KL(γ t_t·T ‖ γ s_t·T)],  γ = γ_t / τ

with the notation of `losses.terms` and a temperature τ. The terms of images to V and of texts to T are the similarity
distillation of SEED (Fang et al. 2021) and CompRess (Abbasi Koohpayegani et al. 2020), where one bank of the teacher's
embeddings serves both models, for each modality. Those of images to T and of texts to V are the relations that
MobileCLIP (Vasu et al. 2024) distils within a batch. CLIP-PING (Thwal et al. 2024) also has a bank for each modality,
but learns from the nearest neighbours in it as further positives.

The student's rows take part at the teacher's scale, not at a learned one: equal embeddings give a loss of 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clip_rd_edge.losses.terms import Products, at_least_float32, term

# Entries of an n×K product that are computed at once, 16 MiB; of which four are in use; one row of a longer bank.
BLOCK_ENTRIES = 2**22


@term("bank", needs={"teacher", "images", "bank"})
def bank(p: Products) -> Tensor:
    """Relations to a bank of the teacher's embeddings V and T, ¼ Σ KL(γ t·Y ‖ γ s·Y) over both sides and Y = V, T."""
    if p.bank is None:
        raise ValueError("The batch has no bank to compare with.")
    with torch.autocast(p.s_v.device.type, enabled=False):
        student = p.parts(torch.cat([p.p_v[p.rows], p.p_t[p.rows]]))
        teacher = p.parts(torch.cat([p.t_v[p.rows], p.t_t[p.rows]]))
        total = student[0].new_zeros(())
        for entries in (p.bank.image, p.bank.text):
            for k, part in enumerate(p.parts(at_least_float32(entries))):
                scale = p.teacher_scales[k] / p.bank_temperature
                total = total + bank_divergence(student[k], teacher[k], part, scale=scale)
    return total / (4 * p.pairs * len(student))


def bank_divergence(student: Tensor, teacher: Tensor, bank: Tensor, *, scale: float | Tensor) -> Tensor:
    """Σ_i KL(scale · t_i·bank ‖ scale · s_i·bank), a scalar: the sum over rows, with a gradient for the student alone.

    Time grows with n·K; memory does not, see BLOCK_ENTRIES.

    Args:
        student, teacher: n rows, (n, D) each.
        bank: (K, D).
        scale: a multiplier without gradient.
    """
    if not len(bank):
        raise ValueError("The bank has no embeddings to compare with.")
    apply: Any = _BankDivergence.apply  # only some versions of torch have types for it
    result: Tensor = apply(student, teacher, bank, scale)
    return result


class _BankDivergence(torch.autograd.Function):
    """Computes the gradient scale · (Q − P) @ bank together with the loss, as P and Q are not kept."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, bank: Tensor, scale: float | Tensor) -> Tensor:
        total, gradient = student.new_zeros(()), torch.empty_like(student)
        for rows in _row_blocks(len(student), len(bank)):
            target, logits = (scale * teacher[rows]) @ bank.T, (scale * student[rows]) @ bank.T
            target_logsumexp, logsumexp = target.logsumexp(1, keepdim=True), logits.logsumexp(1, keepdim=True)
            weights = (target - target_logsumexp).exp_()
            # As in `relational.relation_divergence`: Σ P (log P − log Q), where each row of P sums to 1.
            total += target.sub_(logits).mul_(weights).sum() + (logsumexp - target_logsumexp).sum()
            gradient[rows] = logits.sub_(logsumexp).exp_().sub_(weights) @ bank
        ctx.save_for_backward(student, gradient.mul_(scale))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        apply: Any = _Gradient.apply
        return apply(*ctx.saved_tensors, gradients[0]), None, None, None


class _Gradient(torch.autograd.Function):
    """The gradient for the student's rows; it depends on them, which a second derivative would not know otherwise."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
        return factor * gradient

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("The term of the bank has no second derivative.")


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, BLOCK_ENTRIES // columns)
    for start in range(0, rows, size):
        yield slice(start, start + size)
