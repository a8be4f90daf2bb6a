"""Several teachers as one: their embeddings side by side, and what each term of the objective compares with them.

Teacher k of K has unit embeddings t^k, (B, D_k), and a logit scale γ_k. Side by side, they are unit embeddings of width
D = Σ_k D_k, whose cosines are the means of the teachers' cosines:

    t = (t^1, …, t^K) / √K,    t_v·t_t = 1/K Σ_k t_v^k·t_t^k

MobileCLIP (Vasu et al. 2024) stores the embeddings of its two teachers side by side, too. A student with embeddings of
width D learns one teacher in each part of them; of another width, it has learned projections to D. The terms:

    hrd, affinity       the mean over teachers, 1/K Σ_k HRD(γ_k t_v^k·t_t^k ‖ γ_s s_v·s_t): MobileCLIP's distillation
                        loss. Its gradient is that of the divergence from the mean of the teachers' distributions, so
                        the teachers are averaged after the softmax, each at its own scale. Its minimum is their
                        Jensen-Shannon divergence: 0 where they agree.
    fd, bank            the mean over teachers of the term with the embeddings t^k, the scale γ_k, and part k of the
                        student's embeddings (of the projected ones) times √K: 0 for a student with the embeddings t.
                        FD is a mean over entries, and those of t are smaller the more teachers stand side by side:
                        compared with t as a whole, it would weigh K times less than for one teacher
    icl, vrd, xrd       as for one teacher with the embeddings t

With K = 1, all of them are those of a single teacher.

Teachers that share a text tower, as those tuned from one model with it frozen do, and those stitched to one sentence
encoder, need no parts: with t_t^k = t_t for all k, the mean of their similarities is the similarity to the mean of
their image embeddings,

    1/K Σ_k γ t_v^k·t_t = γ (1/K Σ_k t_v^k)·t_t

so they are one teacher of width D_1, whose image embeddings are the means, L2-normalised, at the mean of their scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Ensemble:
    """How the embeddings of K teachers, one or more, become those of one teacher.

    Attributes:
        teacher_widths: D_k of each teacher.
        scales: γ_k, the logit scale of each, a multiplier.
        share_text: they have one text tower, and with it one width.
    """

    teacher_widths: tuple[int, ...]
    scales: tuple[float, ...]
    share_text: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each part of the joint embeddings: D_k for teacher k, or D_1 for all that share a text tower."""
        return self.teacher_widths[:1] if self.share_text else self.teacher_widths

    @property
    def logit_scale(self) -> float | tuple[float, ...]:
        """The logit scale of each part; a number if there is one part."""
        if self.share_text:
            return math.fsum(self.scales) / len(self.scales)
        return self.scales if len(self.scales) > 1 else self.scales[0]

    def join(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Return t, (B, Σ_k D_k) or (B, D_1), L2-normalised, of the teachers' embeddings t^k, (B, D_k) each."""
        return normalize(torch.stack(list(embeddings)).sum(0), dim=1) if self.share_text else side_by_side(embeddings)


def side_by_side(embeddings: Sequence[Tensor]) -> Tensor:
    """Return t, (B, Σ_k D_k), L2-normalised, of the teachers' embeddings t^k, (B, D_k) each, L2-normalised."""
    if len(embeddings) == 1:
        return embeddings[0]
    return torch.cat(list(embeddings), dim=1) / math.sqrt(len(embeddings))


def teacher_parts(embeddings: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Return the parts of embeddings (B, Σ_k D_k) that stand for each teacher, times √K, (B, D_k) each.

    Args:
        widths: D_1 to D_K; of no or of one teacher, the embeddings are returned as they are.
    """
    if len(widths) <= 1:
        return [embeddings]
    return [part * math.sqrt(len(widths)) for part in torch.split(embeddings, list(widths), dim=1)]
