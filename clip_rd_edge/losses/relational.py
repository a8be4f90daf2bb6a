"""Relational terms: a distribution over the batch is to match another.

Shapes: every matrix is (B, B), logits; its rows and its columns are softmaxed in turn.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def relation_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """½ [KL(P ‖ Q) over rows + KL(Pᵀ ‖ Qᵀ) over columns], P from `target` and Q from `logits`, means over B.

    No gradient reaches `target`. With what it is called tells the term:

    - HRD, horizontal (CLIP-KD calls it CRD): target γ_t t_v·t_t, logits γ_s s_v·s_t
    - VRD, vertical (CLIP-RD): target b t_t·s_t, logits a t_v·s_v; the picture side follows the text side
    """
    target = target.detach()
    return (_row_divergence(target, logits) + _row_divergence(target.T, logits.T)) / 2


def cross_relation_divergence(image_to_text: Tensor, text_to_image: Tensor) -> Tensor:
    """XRD of CLIP-RD: ¼ [KL(sg B ‖ A) + KL(sg A ‖ B) + KL(sg Bᵀ ‖ Aᵀ) + KL(sg Aᵀ ‖ Bᵀ)].

    Args:
        image_to_text: A = c t_v·s_t, (B, B).
        text_to_image: B = c t_t·s_v, (B, B).
    """
    towards_text = relation_divergence(text_to_image, image_to_text)
    return (towards_text + relation_divergence(image_to_text, text_to_image)) / 2


def affinity_mimicking(target: Tensor, logits: Tensor) -> Tensor:
    """½ [CE(P, Q) over rows + CE(Pᵀ, Qᵀ) over columns], affinity mimicking of TinyCLIP (Wu et al. 2023, equation 2).

    The gradient is HRD's; the value is larger by the teacher's entropy.

    Args:
        target: γ_t t_v·t_t, (B, B); no gradient reaches it.
        logits: γ_s s_v·s_t, (B, B).
    """
    target = target.detach()
    rows = F.cross_entropy(logits, target.softmax(dim=1))
    columns = F.cross_entropy(logits.T, target.T.softmax(dim=1))
    return (rows + columns) / 2


def _row_divergence(target: Tensor, logits: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(logits, dim=1), F.log_softmax(target, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
