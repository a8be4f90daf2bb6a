"""The training objective, a weighted sum of terms, and the terms of CLIP, CLIP-KD, TinyCLIP, CLIP-RD and others.

CLIP uses only the task term; CLIP-KD adds FD, ICL and HRD; CLIP-RD adds VRD and XRD to these.

In a batch of images and captions that only partly belong together, the terms that need pairs are those of the B' ≤ B
pairs in it: their means are over B', and the others' are over B. HRD and affinity compare each image with each caption,
and so need no pairs; FD, the contrastive parts of VRD and the bank look at images and captions apart. DIME-FM (Sun et
al. 2023) distils from such data in the same way: by the scores of images and texts that are not pairs, and by relations
within each.

For a whole batch, the B×B products are kept for the backward pass. In blocks of pairs, the rows and columns of each
block are computed separately and then freed: twice the products, but memory grows with B instead of B².
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clip_rd_edge.losses.terms import (
    EmbeddingBatch,
    Logits,
    Need,
    Products,
    TeacherScale,
    at_least_float32,
    find_term,
    mean,
    place_of,
    term,
)
from clip_rd_edge.utils.structs import CheckedError


class Weights(dict[str, float]):
    """The weights of the terms, by name and in the order in which they are summed; a weight of 0 leaves a term out."""

    def __init__(self, weights: Mapping[str, float] = MappingProxyType({}), /, **named: float) -> None:
        given = {**weights, **named}
        for name, weight in given.items():
            find_term(name)
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not (is_number and math.isfinite(weight) and weight >= 0):
                raise CheckedError(f"{name} is {weight!r}; expected a finite number of at least 0")
        super().__init__((name, float(given[name])) for name in sorted(given, key=place_of) if given[name])

    def needing(self, *needs: Need) -> list[str]:
        """Return the names of the terms that need any of these."""
        return [name for name in self if find_term(name).needs & set(needs)]

    @property
    def needs_teacher(self) -> bool:
        """Whether any term uses the teacher's embeddings."""
        return bool(self.needing("teacher"))

    @property
    def needs_pairs(self) -> bool:
        """Whether nothing is left of the objective without pairs."""
        return len(self.needing("pairs")) == len(self)

    def for_texts(self) -> Weights:
        """Return the weights without terms that need images."""
        without = self.needing("images", "pairs")
        return Weights({name: weight for name, weight in self.items() if name not in without})


ScaleKind = Literal["bounded", "raw"]
# Initial scale of the published recipe: ln(1 / 0.07), used as the multiplier itself, not as its logarithm.
PUBLISHED_START = math.log(1 / 0.07)
MAX_SCALE = 100.0
# A float32 just below ln 100, so that the multiplier does not exceed 100.
_MAX_LOG = float(np.nextafter(np.float32(math.log(MAX_SCALE)), np.float32(0)))


class Scales(nn.Module):
    """The learned multipliers a (image), b (text) and c (cross).

    Args:
        kind: `bounded` learns the logarithm and clamps the multiplier to [1, 100], so that a scale can neither become
            negative nor diverge; `raw` learns the multiplier itself, as published.
        start: initial value of the multipliers.
    """

    def __init__(self, kind: ScaleKind = "bounded", *, start: float = PUBLISHED_START) -> None:
        super().__init__()
        self.kind = kind
        value = math.log(start) if kind == "bounded" else start
        self.image = nn.Parameter(torch.tensor(value))
        self.text = nn.Parameter(torch.tensor(value))
        self.cross = nn.Parameter(torch.tensor(value))

    def multiplier(self, parameter: Tensor) -> Tensor:
        """Return the multiplier for one of this module's parameters, a scalar."""
        if self.kind == "raw":
            return parameter
        # Straight-through: from torch 2.15 on, clamp has gradient 0 at the bounds, so a scale could never leave them.
        clamped = parameter.detach().clamp(0.0, _MAX_LOG)
        return (clamped + (parameter - parameter.detach())).exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp bounded parameters to their range; call after each optimiser step."""
        if self.kind == "bounded":
            for parameter in self.parameters():
                parameter.clamp_(0.0, _MAX_LOG)


@dataclass(frozen=True)
class LossTerms:
    """The loss and its terms.

    Attributes:
        total: the weighted sum, a scalar that requires a gradient.
        terms: the unweighted value of each computed term, a scalar.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Objective(nn.Module):
    """The weighted sum of terms.

    Its parameters are the scales a, b and c, and projections if the embedding sizes of student and teacher differ. The
    trainer optimises and saves them, but the student is evaluated and exported without them.

    Args:
        weights: weights of the terms.
        scales, scale_start: see `losses.terms.Scales`.
        widths: embedding sizes of the student and of each teacher, None without a teacher. If the student's is not
            that of the teachers side by side, terms that compare the two use learned linear projections of the
            student's image and text embeddings.
        bank_temperature: τ of the `bank` term.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        scales: ScaleKind = "bounded",
        scale_start: float = PUBLISHED_START,
        widths: tuple[int, ...] | None = None,
        bank_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.weights, self.bank_temperature = weights, bank_temperature
        self.scales = Scales(scales, start=scale_start)
        student, *self.teacher_widths = widths or (0,)
        total = sum(self.teacher_widths)
        differ = widths is not None and student != total
        self.image_projection = nn.Linear(student, total, bias=False) if differ else nn.Identity()
        self.text_projection = nn.Linear(student, total, bias=False) if differ else nn.Identity()

    @property
    def has_projections(self) -> bool:
        """Whether the embedding sizes of student and teachers differ."""
        return not isinstance(self.text_projection, nn.Identity)

    def forward(
        self,
        batch: EmbeddingBatch,
        student_scale: Tensor,
        teacher_scale: TeacherScale,
        *,
        block: slice | None = None,
        student_bias: Tensor | None = None,
    ) -> LossTerms:
        """Return the loss of a global batch, or the contribution of a block of its pairs.

        Args:
            batch: embeddings of the global batch.
            student_scale: γ_s, the student's logit scale as a multiplier, a scalar.
            teacher_scale: γ_t, the teacher's logit scale, or those of several teachers.
            student_bias: β_s, a scalar, of a student that has a bias.
            block: pairs `start` to `stop`; the losses of blocks that partition the batch add up to that of the batch.
        """
        whole = pairs = Products(batch, self, student_scale, teacher_scale, block, student_bias)
        if batch.paired is not None:
            within = block and slice(*(int(batch.paired[:end].sum()) for end in (block.start, block.stop)))
            pairs = Products(batch.only_pairs(), self, student_scale, teacher_scale, within, student_bias)
        terms = {}
        for name in self.weights:
            registered = find_term(name)
            products = pairs if "pairs" in registered.needs else whole
            # Of a batch without pairs: 0, with a graph.
            terms[name] = registered.compute(products) if products.pairs else products.s_v.sum() + products.s_t.sum()
        total = torch.stack([weight * terms[name] for name, weight in self.weights.items()]).sum()
        return LossTerms(total=total, terms=terms)


@term("task", needs={"pairs", "images"}, matches=True)
def task(p: Products) -> Tensor:
    """The InfoNCE loss of CLIP (Radford et al. 2021), ½ [CE(γ_s s_v·s_t) + CE(γ_s s_t·s_v)]."""
    return _both_ways(p.student())


@term("sigmoid", needs={"pairs", "images"}, matches=True)
def sigmoid(p: Products) -> Tensor:
    """The pairwise loss of SigLIP (Zhai et al. 2023), −(1/B) Σ_ij log σ(z_ij (γ_s s_v·s_t + β_s)_ij).

    z is 1 for an image and its own caption, and −1 for all others. It trains β_s, the student's bias, and each pair is
    scored by itself: a process needs the rows of its own images alone. Beside it, the terms of relations compare
    softmaxes of the cosines, each side at its own scale, in which a bias has no part.
    """
    assert p.student_bias is not None  # of a run whose recipe has this term
    logits = p.student()
    # log σ(−x) = −softplus(x), and log σ(x) is x more.
    return (
        nn.functional.softplus(logits.rows + p.student_bias).sum() - (logits.diagonal + p.student_bias).sum()
    ) / p.pairs


@term("icl", needs={"teacher", "pairs", "images"})
def icl(p: Products) -> Tensor:
    """Interactive contrastive learning of CLIP-KD (Yang et al. 2024), ½ [CE(c s_v·t_t) + CE(c s_t·t_v)].

    The student's embeddings are the queries: the columns of c t_t·s_v are the rows of c s_v·t_t.
    """
    return (_columns(p.text_to_image()) + _columns(p.image_to_text())) / (2 * p.pairs)


@term("vrd_ce_image", needs={"teacher", "images"})
def vrd_ce_image(p: Products) -> Tensor:
    """The contrastive part of VRD for images (CLIP-RD), ½ [CE(a t_v·s_v) + CE(a s_v·t_v)]."""
    return _both_ways(p.image_to_image())


@term("vrd_ce_text", needs={"teacher"})
def vrd_ce_text(p: Products) -> Tensor:
    """The contrastive part of VRD for texts (CLIP-RD), ½ [CE(b t_t·s_t) + CE(b s_t·t_t)]."""
    return _both_ways(p.text_to_text())


def _both_ways(logits: Logits) -> Tensor:
    """½ [CE(L) + CE(Lᵀ)]."""
    return (_rows(logits) + _columns(logits)) / (2 * logits.pairs)


def _rows(logits: Logits) -> Tensor:
    """Sum over rows of the cross-entropy with the matching pair as the target."""
    return (logits.row_logsumexp - logits.diagonal).sum()


def _columns(logits: Logits) -> Tensor:
    return (logits.column_logsumexp - logits.diagonal).sum()


@term("hrd", needs={"teacher", "images"}, matches=True)
def hrd(p: Products) -> Tensor:
    """Horizontal relational distillation, ½ [KL(T ‖ L) + KL(Tᵀ ‖ Lᵀ)], T = γ_t t_v·t_t, L = γ_s s_v·s_t.

    It is the CRD of CLIP-KD.
    """
    return mean(relation_divergence(teacher, p.student()) for teacher in p.teachers())


@term("affinity", needs={"teacher", "images"}, matches=True)
def affinity(p: Products) -> Tensor:
    """Affinity mimicking of TinyCLIP (Wu et al. 2023), ½ [H(T, L) + H(Tᵀ, Lᵀ)], T = γ_t t_v·t_t, L = γ_s s_v·s_t.

    With H(T, L) = −(1/B) Σ_i Σ_j P_ij log Q_ij, it equals HRD plus the entropy of the teacher: its gradient is HRD's.
    """
    return mean(relation_divergence(teacher, p.student()) + _entropy(teacher) for teacher in p.teachers())


@term("vrd_kl", needs={"teacher", "pairs", "images"})
def vrd_kl(p: Products) -> Tensor:
    """Vertical relational distillation (CLIP-RD), ½ [KL(sg(b t_t·s_t) ‖ a t_v·s_v) + KL(sg(b s_t·t_t) ‖ a s_v·t_v)].

    The image side follows the text side.
    """
    return relation_divergence(p.text_to_text(), p.image_to_image())


@term("xrd", needs={"teacher", "pairs", "images"})
def xrd(p: Products) -> Tensor:
    """Cross relational distillation (CLIP-RD), ¼ [KL(sg B ‖ A) + KL(sg A ‖ B) + KL(sg Bᵀ ‖ Aᵀ) + KL(sg Aᵀ ‖ Bᵀ)].

    With A = c t_v·s_t and B = c t_t·s_v.
    """
    towards_text = relation_divergence(p.text_to_image(), p.image_to_text())
    return (towards_text + relation_divergence(p.image_to_text(), p.text_to_image())) / 2


def relation_divergence(target: Logits, logits: Logits) -> Tensor:
    """½ [KL(T ‖ L) + KL(Tᵀ ‖ Lᵀ)] for the target T and the logits L; a scalar. No gradient reaches T."""
    # KL = Σ P (log P − log Q) with log P = T − logsumexp T. As each row of P sums to 1, the logsumexps can be added
    # separately.
    rows, columns = target.row_distribution(), target.column_distribution()
    if target.is_whole:
        # Both directions weight the same entries T − L, so one pass is enough.
        expected = _expected_difference(rows.add_(columns.T), target.rows, logits.rows)
    else:
        expected = _expected_difference(rows, target.rows, logits.rows)
        expected = expected + _expected_difference(columns, target.columns, logits.columns)
    normalisers = logits.row_logsumexp - target.row_logsumexp.detach()
    normalisers = normalisers + logits.column_logsumexp - target.column_logsumexp.detach()
    return (expected + normalisers.sum()) / (2 * logits.pairs)


@torch.no_grad()
def _entropy(logits: Logits) -> Tensor:
    """½ [entropy of the row distributions + entropy of the column distributions], means over B."""
    rows = logits.row_logsumexp.sum() - (logits.row_distribution() * logits.rows).sum()
    columns = logits.column_logsumexp.sum() - (logits.column_distribution() * logits.columns).sum()
    return (rows + columns) / (2 * logits.pairs)


class _ExpectedDifference(torch.autograd.Function):
    """Σ P (T − L), with the gradient −P for L and none for P and T.

    Autograd would store T − L as well as P. Computing P·T and P·L separately would lose precision by cancellation.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, target: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return (target - logits).mul_(weights).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        (weights,) = ctx.saved_tensors
        return None, None, weights * -gradients[0]


def _expected_difference(weights: Tensor, target: Tensor, logits: Tensor) -> Tensor:
    apply: Any = _ExpectedDifference.apply  # only some versions of torch have types for it
    result: Tensor = apply(weights, target.detach(), logits)
    return result


@term("fd", needs={"teacher"})
def fd(p: Products) -> Tensor:
    """Feature distillation of CLIP-KD (Yang et al. 2024), mean((s_v − t_v)²) + mean((s_t − t_t)²) over B·D entries."""
    sides = ((p.p_v[p.rows], p.t_v[p.rows]), (p.p_t[p.rows], p.t_t[p.rows]))
    parts = [zip(p.parts(student), p.parts(teacher), strict=True) for student, teacher in sides]
    terms = [[(s - t).square().sum() / (p.pairs * s.shape[1]) for s, t in side] for side in parts]
    return mean(image + text for image, text in zip(*terms, strict=True))


# Entries of an n×K product that are computed at once, 16 MiB; of which four are in use; one row of a longer bank.
BLOCK_ENTRIES = 2**22


@term("bank", needs={"teacher", "images", "bank"})
def bank(p: Products) -> Tensor:
    """Relations to a bank of the teacher's embeddings V and T, ¼ Σ KL(γ t·Y ‖ γ s·Y) over both sides and Y = V, T.

    The other terms compare B pairs with each other. This one compares how student and teacher relate each pair to K
    images V and K' captions T that the teacher has embedded, (K, D) and (K', D), such as all of the data set. γ = γ_t /
    τ with a temperature τ: the student's rows take part at the teacher's scale, so that equal embeddings give 0.

    The terms of images to V and of texts to T are the similarity distillation of SEED (Fang et al. 2021) and CompRess
    (Abbasi Koohpayegani et al. 2020), where one bank of the teacher's embeddings serves both models, for each modality.
    Those of images to T and of texts to V are the relations that MobileCLIP (Vasu et al. 2024) distils within a batch.
    CLIP-PING (Thwal et al. 2024) also has a bank for each modality, but learns from the nearest neighbours in it.
    """
    assert p.bank is not None  # of a run whose recipe has this term
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
            # As in `relation_divergence`: Σ P (log P − log Q), where each row of P sums to 1.
            total += target.sub_(logits).mul_(weights).sum() + (logsumexp - target_logsumexp).sum()
            gradient[rows] = logits.sub_(logsumexp).exp_().sub_(weights) @ bank
        ctx.save_for_backward(gradient.mul_(scale))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradients[0] * gradient, None, None, None


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, BLOCK_ENTRIES // columns)
    for start in range(0, rows, size):
        yield slice(start, start + size)
