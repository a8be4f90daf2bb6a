"""Relational terms: a distribution over the batch is to match another, in rows and in columns."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from clip_rd_edge.losses.logits import Logits


def relation_divergence(target: Logits, logits: Logits) -> Tensor:
    """½ [KL(P ‖ Q) over rows + KL(Pᵀ ‖ Qᵀ) over columns], P from `target` and Q from `logits`, means over B; a scalar.

    No gradient reaches `target`. What stands in the two tells the term:

    - HRD, horizontal (CLIP-KD calls it CRD): target γ_t t_v·t_t, logits γ_s s_v·s_t
    - VRD, vertical (CLIP-RD): target b t_t·s_t, logits a t_v·s_v; the picture side follows the text side
    """
    target = target.detach()
    rows, columns = _divergence(target.rows, logits.rows), _divergence(target.columns, logits.columns)
    return (rows + columns) / (2 * logits.pairs)


def cross_relation_divergence(image_to_text: Logits, text_to_image: Logits) -> Tensor:
    """XRD of CLIP-RD: ¼ [KL(sg B ‖ A) + KL(sg A ‖ B) + KL(sg Bᵀ ‖ Aᵀ) + KL(sg Aᵀ ‖ Bᵀ)]; a scalar.

    Args:
        image_to_text: A = c t_v·s_t.
        text_to_image: B = c t_t·s_v.
    """
    towards_text = relation_divergence(text_to_image, image_to_text)
    return (towards_text + relation_divergence(image_to_text, text_to_image)) / 2


def affinity_mimicking(target: Logits, logits: Logits) -> Tensor:
    """½ [CE(P, Q) over rows + CE(Pᵀ, Qᵀ) over columns], affinity mimicking of TinyCLIP (Wu et al. 2023); a scalar.

    The gradient is HRD's; the value is larger by the teacher's entropy.

    Args:
        target: γ_t t_v·t_t; no gradient reaches it.
        logits: γ_s s_v·s_t.
    """
    target = target.detach()
    rows = F.cross_entropy(logits.rows, target.rows.softmax(dim=1), reduction="sum")
    columns = F.cross_entropy(logits.columns, target.columns.softmax(dim=1), reduction="sum")
    return (rows + columns) / (2 * logits.pairs)


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(logits, dim=1), F.log_softmax(target, dim=1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
