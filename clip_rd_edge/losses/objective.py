"""The objective: a weighted sum of terms, from at most six B×B products, of which only those needed are computed.

    product          definition    serves
    student          s_v·s_t       task, HRD, affinity
    teacher          t_v·t_t       HRD, affinity (target)
    image_to_text    t_v·s_t       ICL (transposed), XRD
    text_to_image    t_t·s_v       ICL (transposed), XRD
    image_to_image   t_v·s_v       VRD
    text_to_text     t_t·s_t       VRD

CLIP is the task alone; CLIP-KD adds FD, ICL and HRD; CLIP-RD adds VRD and XRD to that.

The whole batch at once keeps the six matrices for the backward pass. In blocks of pairs, each block's rows and columns
are computed apart and forgotten: twice the products, and memory that grows with B and not with B².
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor, nn

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.losses.logits import PUBLISHED_START, Logits, ScaleKind, Scales, product
from clip_rd_edge.losses.terms import (
    affinity_mimicking,
    cross_relation_divergence,
    feature_distillation,
    interactive_contrastive,
    relation_divergence,
    symmetric_contrastive,
)


class Weights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much each term weighs; a term of weight 0 is not computed."""

    task: float = 0.0
    fd: float = 0.0
    icl: float = 0.0
    hrd: float = 0.0
    affinity: float = 0.0
    vrd_kl: float = 0.0
    vrd_ce_image: float = 0.0
    vrd_ce_text: float = 0.0
    xrd: float = 0.0

    def active(self) -> dict[str, float]:
        """The terms that weigh, by name."""
        return {name: weight for name, weight in msgspec.structs.asdict(self).items() if weight != 0.0}

    @property
    def need_teacher(self) -> bool:
        """Whether any term that weighs looks at the teacher."""
        return any(name != "task" for name in self.active())


@dataclass(frozen=True)
class LossTerms:
    """The loss and what it is made of.

    Attributes:
        total: the weighted sum, a scalar with its graph.
        terms: each computed term at weight 1.
    """

    total: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class EmbeddingBatch:
    """Embeddings of the global batch, (B, D) each, L2-normalised; the teacher's are None where there is no teacher."""

    student_image: Tensor
    student_text: Tensor
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None


class Objective(nn.Module):
    """Adds up the terms that weigh. Its parameters are the scales a, b, c, and projections where widths differ; the
    trainer optimises and saves them. They are no part of the student, which is evaluated and exported without them.

    Args:
        widths: of the student's and the teacher's embeddings; None where there is no teacher. Where they differ, terms
            that compare the two see the student through a learnt projection, an image one and a text one.

    Raises:
        ConfigError: no term weighs.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        scales: ScaleKind = "bounded",
        scale_start: float = PUBLISHED_START,
        widths: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if not weights.active():
            raise ConfigError("The objective has no term with a weight; expected at least one, such as task: 1.")
        self.weights = weights
        self.scales = Scales(scales, start=scale_start)
        differ = widths is not None and widths[0] != widths[1]
        self.image_projection = nn.Linear(*widths, bias=False) if widths and differ else nn.Identity()
        self.text_projection = nn.Linear(*widths, bias=False) if widths and differ else nn.Identity()

    def forward(
        self,
        batch: EmbeddingBatch,
        student_scale: Tensor,
        teacher_scale: float | Tensor,
        *,
        block: slice | None = None,
    ) -> LossTerms:
        """The loss of a global batch, or what a block of its pairs adds to it.

        Args:
            student_scale: γ_s, the student's logit scale as a multiplier, a scalar.
            teacher_scale: γ_t, the teacher's.
            block: pairs `start` to `stop`; the losses of blocks that cut the batch add up to the loss of the whole.
        """
        products = _Products(batch, self, student_scale, teacher_scale, block)
        terms = {name: _TERMS[name](products) for name in self.weights.active()}
        weighted = [weight * terms[name] for name, weight in self.weights.active().items()]
        return LossTerms(total=torch.stack(weighted).sum(), terms=terms)


class _Products:
    """The scaled products, each computed when first asked for, in float32 at least."""

    def __init__(
        self,
        batch: EmbeddingBatch,
        objective: Objective,
        student_scale: Tensor,
        teacher_scale: float | Tensor,
        block: slice | None,
    ) -> None:
        self.s_v, self.s_t = _at_least_float32(batch.student_image), _at_least_float32(batch.student_text)
        # What terms that compare the two look at: the student's own, or its projections.
        self.p_v, self.p_t = self.s_v, self.s_t
        if batch.teacher_image is not None and batch.teacher_text is not None:
            self.t_v, self.t_t = _at_least_float32(batch.teacher_image), _at_least_float32(batch.teacher_text)
            self.p_v = _projected(objective.image_projection, self.s_v)
            self.p_t = _projected(objective.text_projection, self.s_t)
        self._scales, self._student_scale, self._teacher_scale = objective.scales, student_scale, teacher_scale
        self._block = block
        self._computed: dict[str, Logits] = {}

    def features(self) -> Tensor:
        part = self._block or slice(None)
        image = feature_distillation(self.p_v[part], self.t_v[part], pairs=len(self.s_v))
        return image + feature_distillation(self.p_t[part], self.t_t[part], pairs=len(self.s_v))

    def student(self) -> Logits:
        return self._once("student", lambda: (self._student_scale, self.s_v, self.s_t))

    def teacher(self) -> Logits:
        return self._once("teacher", lambda: (self._teacher_scale, self.t_v, self.t_t))

    def image_to_text(self) -> Logits:
        return self._once("image_to_text", lambda: (self._scale("cross"), self.t_v, self.p_t))

    def text_to_image(self) -> Logits:
        return self._once("text_to_image", lambda: (self._scale("cross"), self.t_t, self.p_v))

    def image_to_image(self) -> Logits:
        return self._once("image_to_image", lambda: (self._scale("image"), self.t_v, self.p_v))

    def text_to_text(self) -> Logits:
        return self._once("text_to_text", lambda: (self._scale("text"), self.t_t, self.p_t))

    def _scale(self, name: str) -> Tensor:
        return self._scales.multiplier(self._scales.get_parameter(name))

    def _once(self, name: str, factors: Callable[[], tuple[float | Tensor, Tensor, Tensor]]) -> Logits:
        if name not in self._computed:
            # Autocast would take the products in half precision, where neighbouring logits become equal.
            with torch.autocast(self.s_v.device.type, enabled=False):
                scale, one, other = factors()
                self._computed[name] = product(scale * one, other, self._block)
        return self._computed[name]


_TERMS: dict[str, Callable[[_Products], Tensor]] = {
    "task": lambda p: symmetric_contrastive(p.student()),
    "fd": lambda p: p.features(),
    "icl": lambda p: interactive_contrastive(p.text_to_image(), p.image_to_text()),
    "hrd": lambda p: relation_divergence(p.teacher(), p.student()),
    "affinity": lambda p: affinity_mimicking(p.teacher(), p.student()),
    "vrd_kl": lambda p: relation_divergence(p.text_to_text(), p.image_to_image()),
    "vrd_ce_image": lambda p: symmetric_contrastive(p.image_to_image()),
    "vrd_ce_text": lambda p: symmetric_contrastive(p.text_to_text()),
    "xrd": lambda p: cross_relation_divergence(p.image_to_text(), p.text_to_image()),
}


def _projected(projection: nn.Module, embeddings: Tensor) -> Tensor:
    if isinstance(projection, nn.Identity):
        return embeddings
    with torch.autocast(embeddings.device.type, enabled=False):
        return nn.functional.normalize(projection(embeddings), dim=-1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
