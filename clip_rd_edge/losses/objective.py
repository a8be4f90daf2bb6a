"""The training objective: a weighted sum of terms, computed from up to six B×B products, each only if it is needed.

    product          definition    used by
    student          s_v·s_t       task, HRD, affinity
    teacher          t_v·t_t       HRD, affinity (target)
    image_to_text    t_v·s_t       ICL (transposed), XRD
    text_to_image    t_t·s_v       ICL (transposed), XRD
    image_to_image   t_v·s_v       VRD
    text_to_text     t_t·s_t       VRD

CLIP uses only the task term; CLIP-KD adds FD, ICL and HRD; CLIP-RD adds VRD and XRD to these. The relations to a bank
have B×K products of their own, see `losses.bank`. Of several teachers, `teacher` is one product for each: see
`losses.ensemble`.

In a batch of images and captions that only partly belong together, the terms of PAIR_TERMS, which compare an image with
its own caption, are those of the B' ≤ B pairs in it: their means are over B', and the others' are over B. HRD and
affinity compare each image with each caption, and so need no pairs; FD, the contrastive parts of VRD and the bank look
at images and captions apart. DIME-FM (Sun et al. 2023) distils from such data in the same way: by the scores of images
and texts that are no pairs, and by relations within each.

For a whole batch, the six matrices are kept for the backward pass. In blocks of pairs, the rows and columns of each
block are computed separately and then freed: twice the products, but memory grows with B instead of B².
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor, nn

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.losses.bank import Bank, bank_divergence
from clip_rd_edge.losses.ensemble import teacher_parts
from clip_rd_edge.losses.logits import PUBLISHED_START, Logits, ScaleKind, Scales, compute_logits
from clip_rd_edge.losses.terms import (
    affinity_mimicking,
    cross_relation_divergence,
    feature_distillation,
    interactive_contrastive,
    relation_divergence,
    symmetric_contrastive,
)
from clip_rd_edge.utils.structs import CheckedStruct, NonNegativeFloat

TeacherScale = float | Tensor | tuple[float, ...]
# Terms that need the caption of an image; see above.
PAIR_TERMS = frozenset({"task", "icl", "vrd_kl", "xrd"})
# Terms that compare the student's own image and text embeddings. The others compare each with the teacher's: where the
# sizes differ, through a projection each, which does not keep the student's images and texts together.
MATCHING_TERMS = frozenset({"task", "hrd", "affinity"})
# Terms that have a part for texts alone; without images, that of images is 0.
TEXT_TERMS = frozenset({"fd", "vrd_ce_text"})


class Weights(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights of the terms; a term with weight 0 is not computed. The symbols are explained in `losses.terms`.

    Attributes:
        task: ½ [CE(γ_s s_v·s_t) + CE(γ_s s_t·s_v)]
        fd: feature distillation, mean((s_v − t_v)²) + mean((s_t − t_t)²)
        icl: interactive contrastive learning, ½ [CE(c s_v·t_t) + CE(c s_t·t_v)]
        hrd: horizontal relational distillation, ½ [KL(γ_t t_v·t_t ‖ γ_s s_v·s_t) + KL(γ_t t_t·t_v ‖ γ_s s_t·s_v)]
        affinity: affinity mimicking; HRD plus the entropy of the teacher
        vrd_kl: vertical relational distillation, ½ [KL(sg(b t_t·s_t) ‖ a t_v·s_v) + KL(sg(b s_t·t_t) ‖ a s_v·t_v)]
        vrd_ce_image: contrastive part of VRD for images, ½ [CE(a t_v·s_v) + CE(a s_v·t_v)]
        vrd_ce_text: contrastive part of VRD for texts, ½ [CE(b t_t·s_t) + CE(b s_t·t_t)]
        xrd: cross relational distillation, ¼ [KL(sg B ‖ A) + KL(sg A ‖ B) + KL(sg Bᵀ ‖ Aᵀ) + KL(sg Aᵀ ‖ Bᵀ)] with
            A = c t_v·s_t and B = c t_t·s_v
        bank: relations to a bank, ¼ [KL(γ t_v·V ‖ γ s_v·V) + KL(γ t_v·T ‖ γ s_v·T) + KL(γ t_t·V ‖ γ s_t·V) +
            KL(γ t_t·T ‖ γ s_t·T)] with γ = γ_t / τ and the teacher's embeddings V and T of other images and captions;
            see `losses.bank`
    """

    task: NonNegativeFloat = 0.0
    fd: NonNegativeFloat = 0.0
    icl: NonNegativeFloat = 0.0
    hrd: NonNegativeFloat = 0.0
    affinity: NonNegativeFloat = 0.0
    vrd_kl: NonNegativeFloat = 0.0
    vrd_ce_image: NonNegativeFloat = 0.0
    vrd_ce_text: NonNegativeFloat = 0.0
    xrd: NonNegativeFloat = 0.0
    bank: NonNegativeFloat = 0.0

    def active(self) -> dict[str, float]:
        """Return the nonzero weights by the name of the term."""
        return {name: weight for name, weight in msgspec.structs.asdict(self).items() if weight != 0.0}

    @property
    def needs_teacher(self) -> bool:
        """Whether any active term uses the teacher's embeddings."""
        return any(name != "task" for name in self.active())

    @property
    def needs_pairs(self) -> bool:
        """Whether nothing is left of the objective without pairs."""
        return PAIR_TERMS.issuperset(self.active())

    def for_texts(self) -> Weights:
        """Return the weights without terms that need images."""
        return Weights(**{name: weight for name, weight in self.active().items() if name in TEXT_TERMS})


@dataclass(frozen=True)
class LossTerms:
    """The loss and its terms.

    Attributes:
        total: the weighted sum, a scalar that requires a gradient.
        terms: the unweighted value of each computed term, a scalar.
    """

    total: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class EmbeddingBatch:
    """L2-normalised embeddings of the global batch, (B, D) each; the teacher's are None if there is no teacher.

    Those of several teachers are side by side, see `losses.ensemble`.

    Attributes:
        bank: what the `bank` term compares with; None without this term.
        paired: which rows are an image and its own caption, (B,) bool; None if all are.
    """

    student_image: Tensor
    student_text: Tensor
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None
    bank: Bank | None = None
    paired: Tensor | None = None

    def only_pairs(self) -> EmbeddingBatch:
        """Return the B' rows that are pairs, without the bank if there are others."""
        if self.paired is None:
            return self
        rows = self.paired.nonzero()[:, 0]
        return EmbeddingBatch(
            self.student_image[rows],
            self.student_text[rows],
            None if self.teacher_image is None else self.teacher_image[rows],
            None if self.teacher_text is None else self.teacher_text[rows],
        )


class Objective(nn.Module):
    """The weighted sum of the active terms.

    Its parameters are the scales a, b and c, and projections if the embedding sizes of student and teacher differ. The
    trainer optimises and saves them, but the student is evaluated and exported without them.

    Args:
        weights: weights of the terms.
        scales, scale_start: see `losses.logits.Scales`.
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
        if not weights.active():
            raise ConfigError("All weights of the objective are 0; expected at least one term, such as task: 1.")
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
    ) -> LossTerms:
        """Return the loss of a global batch, or the contribution of a block of its pairs.

        Args:
            batch: embeddings of the global batch.
            student_scale: γ_s, the student's logit scale as a multiplier, a scalar.
            teacher_scale: γ_t, the teacher's logit scale, or those of several teachers.
            block: pairs `start` to `stop`; the losses of blocks that partition the batch add up to that of the batch.
        """
        whole = pairs = _Products(batch, self, student_scale, teacher_scale, block)
        if batch.paired is not None:
            pairs_block = block and _within(block, batch.paired)
            pairs = _Products(batch.only_pairs(), self, student_scale, teacher_scale, pairs_block)
        terms = {name: _compute(name, pairs if name in PAIR_TERMS else whole) for name in self.weights.active()}
        weighted = [weight * terms[name] for name, weight in self.weights.active().items()]
        return LossTerms(total=torch.stack(weighted).sum(), terms=terms)


class _Products:
    """The scaled products, each computed on first use, at least in float32."""

    def __init__(
        self,
        batch: EmbeddingBatch,
        objective: Objective,
        student_scale: Tensor,
        teacher_scale: TeacherScale,
        block: slice | None,
    ) -> None:
        self.s_v, self.s_t = _at_least_float32(batch.student_image), _at_least_float32(batch.student_text)
        # Student embeddings for terms that compare student and teacher, projected if their sizes differ.
        self.p_v, self.p_t = self.s_v, self.s_t
        if batch.teacher_image is not None and batch.teacher_text is not None:
            self.t_v, self.t_t = _at_least_float32(batch.teacher_image), _at_least_float32(batch.teacher_text)
            self.p_v = _projected(objective.image_projection, self.s_v)
            self.p_t = _projected(objective.text_projection, self.s_t)
        self._scales, self._student_scale = objective.scales, student_scale
        self._teacher_scales = teacher_scale if isinstance(teacher_scale, tuple) else (teacher_scale,)
        self._teacher_widths = objective.teacher_widths
        if len(self._teacher_scales) != max(1, len(self._teacher_widths)):
            raise ValueError(f"{len(self._teacher_scales)} scales were given for {len(self._teacher_widths)} teachers.")
        self._bank, self._bank_temperature = batch.bank, objective.bank_temperature
        self._block = block
        self._computed: dict[str, Logits] = {}

    def feature_distillation(self) -> Tensor:
        block = self._block or slice(None)
        pairs = ((self.p_v[block], self.t_v[block]), (self.p_t[block], self.t_t[block]))
        parts = [zip(self._parts(student), self._parts(teacher), strict=True) for student, teacher in pairs]
        terms = [[feature_distillation(s, t, pairs=len(self.s_v)) for s, t in side] for side in parts]
        return _mean(image + text for image, text in zip(*terms, strict=True))

    def bank_divergence(self) -> Tensor:
        if self._bank is None:
            raise ValueError("The batch has no bank to compare with.")
        block = self._block or slice(None)
        with torch.autocast(self.s_v.device.type, enabled=False):
            student = self._parts(torch.cat([self.p_v[block], self.p_t[block]]))
            teacher = self._parts(torch.cat([self.t_v[block], self.t_t[block]]))
            total = student[0].new_zeros(())
            for entries in (self._bank.image, self._bank.text):
                for k, part in enumerate(self._parts(_at_least_float32(entries))):
                    scale = self._teacher_scales[k] / self._bank_temperature
                    total = total + bank_divergence(student[k], teacher[k], part, scale=scale)
        return total / (4 * len(self.s_v) * len(student))

    def student(self) -> Logits:
        return self._cached("student", lambda: (self._student_scale, self.s_v, self.s_t))

    def teachers(self) -> list[Logits]:
        images, texts = self._parts(self.t_v), self._parts(self.t_t)
        return [self._teacher(k, *pair) for k, pair in enumerate(zip(images, texts, strict=True))]

    def _teacher(self, k: int, image: Tensor, text: Tensor) -> Logits:
        return self._cached(f"teacher {k}", lambda: (self._teacher_scales[k], image, text))

    def _parts(self, embeddings: Tensor) -> list[Tensor]:
        return teacher_parts(embeddings, self._teacher_widths)

    def image_to_text(self) -> Logits:
        return self._cached("image_to_text", lambda: (self._scale("cross"), self.t_v, self.p_t))

    def text_to_image(self) -> Logits:
        return self._cached("text_to_image", lambda: (self._scale("cross"), self.t_t, self.p_v))

    def image_to_image(self) -> Logits:
        return self._cached("image_to_image", lambda: (self._scale("image"), self.t_v, self.p_v))

    def text_to_text(self) -> Logits:
        return self._cached("text_to_text", lambda: (self._scale("text"), self.t_t, self.p_t))

    def _scale(self, name: str) -> Tensor:
        return self._scales.multiplier(self._scales.get_parameter(name))

    def _cached(self, name: str, factors: Callable[[], tuple[float | Tensor, Tensor, Tensor]]) -> Logits:
        if name not in self._computed:
            # Under autocast, the products would be in half precision, where close logits become equal.
            with torch.autocast(self.s_v.device.type, enabled=False):
                scale, left, right = factors()
                self._computed[name] = compute_logits(scale * left, right, self._block)
        return self._computed[name]


_TERMS: dict[str, Callable[[_Products], Tensor]] = {
    "task": lambda p: symmetric_contrastive(p.student()),
    "fd": lambda p: p.feature_distillation(),
    "icl": lambda p: interactive_contrastive(p.text_to_image(), p.image_to_text()),
    "hrd": lambda p: _mean(relation_divergence(teacher, p.student()) for teacher in p.teachers()),
    "affinity": lambda p: _mean(affinity_mimicking(teacher, p.student()) for teacher in p.teachers()),
    "vrd_kl": lambda p: relation_divergence(p.text_to_text(), p.image_to_image()),
    "vrd_ce_image": lambda p: symmetric_contrastive(p.image_to_image()),
    "vrd_ce_text": lambda p: symmetric_contrastive(p.text_to_text()),
    "xrd": lambda p: cross_relation_divergence(p.image_to_text(), p.text_to_image()),
    "bank": lambda p: p.bank_divergence(),
}


def _mean(terms: Iterable[Tensor]) -> Tensor:
    terms = list(terms)
    return terms[0] if len(terms) == 1 else torch.stack(terms).mean()


def _compute(name: str, products: _Products) -> Tensor:
    if len(products.s_v):
        return _TERMS[name](products)
    return products.s_v.sum() + products.s_t.sum()  # of a batch without pairs: 0, with a graph


def _within(block: slice, paired: Tensor) -> slice:
    """Return the part of the pairs alone that lies in a block of all rows."""
    return slice(int(paired[: block.start].sum()), int(paired[: block.stop].sum()))


def _projected(projection: nn.Module, embeddings: Tensor) -> Tensor:
    if isinstance(projection, nn.Identity):
        return embeddings
    with torch.autocast(embeddings.device.type, enabled=False):
        return nn.functional.normalize(projection(embeddings), dim=-1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
