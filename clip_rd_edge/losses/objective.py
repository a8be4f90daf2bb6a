"""The objective: a weighted sum of terms, from at most six B×B products, of which only those needed are computed.

    product          definition    serves
    student          s_v·s_t       task, HRD, affinity
    teacher          t_v·t_t       HRD, affinity (target)
    image_to_text    t_v·s_t       ICL (transposed), XRD
    text_to_image    t_t·s_v       ICL (transposed), XRD
    image_to_image   t_v·s_v       VRD
    text_to_text     t_t·s_t       VRD

CLIP is the task alone; CLIP-KD adds FD, ICL and HRD; CLIP-RD adds VRD and XRD to that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor, nn

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.losses.contrastive import interactive_contrastive, symmetric_contrastive
from clip_rd_edge.losses.feature import feature_distillation
from clip_rd_edge.losses.relational import affinity_mimicking, cross_relation_divergence, relation_divergence
from clip_rd_edge.losses.scales import PUBLISHED_START, ScaleKind, Scales


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


@dataclass(frozen=True)
class LossTerms:
    """The loss and what it is made of.

    Attributes:
        total: the weighted sum, a scalar with its graph.
        terms: each computed term at weight 1.
    """

    total: Tensor
    terms: dict[str, Tensor]

    def backward(self) -> None:
        """Add the total's gradients to the leaves'."""
        self.total.backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class EmbeddingBatch:
    """Embeddings of the global batch, (B, D) each, L2-normalised; the teacher's are None where there is no teacher."""

    student_image: Tensor
    student_text: Tensor
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None


class Objective(nn.Module):
    """Adds up the terms that weigh. Its parameters are the scales a, b, c; the trainer optimises and saves them.

    Raises:
        ConfigError: no term weighs.
    """

    def __init__(
        self, weights: Weights, *, scales: ScaleKind = "bounded", scale_start: float = PUBLISHED_START
    ) -> None:
        super().__init__()
        if not weights.active():
            raise ConfigError("The objective has no term with a weight; expected at least one, such as task: 1.")
        self.weights = weights
        self.scales = Scales(scales, start=scale_start)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the teacher."""
        return any(name != "task" for name in self.weights.active())

    def forward(self, batch: EmbeddingBatch, student_scale: Tensor, teacher_scale: float | Tensor) -> LossTerms:
        """The loss of a global batch.

        Args:
            student_scale: γ_s, the student's logit scale as a multiplier, a scalar.
            teacher_scale: γ_t, the teacher's.
        """
        products = _Products(batch, self.scales, student_scale, teacher_scale)
        terms = {name: _TERMS[name](products) for name in self.weights.active()}
        weighted = [weight * terms[name] for name, weight in self.weights.active().items()]
        return LossTerms(total=torch.stack(weighted).sum(), terms=terms)


class _Products:
    """The scaled products, each computed when first asked for, in float32 at least."""

    def __init__(
        self, batch: EmbeddingBatch, scales: Scales, student_scale: Tensor, teacher_scale: float | Tensor
    ) -> None:
        self.s_v, self.s_t = _at_least_float32(batch.student_image), _at_least_float32(batch.student_text)
        if batch.teacher_image is not None and batch.teacher_text is not None:
            self.t_v, self.t_t = _at_least_float32(batch.teacher_image), _at_least_float32(batch.teacher_text)
        self._scales, self._student_scale, self._teacher_scale = scales, student_scale, teacher_scale
        self._computed: dict[str, Tensor] = {}

    def student(self) -> Tensor:
        return self._once("student", lambda: self._student_scale * (self.s_v @ self.s_t.T))

    def teacher(self) -> Tensor:
        return self._once("teacher", lambda: self._teacher_scale * (self.t_v @ self.t_t.T))

    def image_to_text(self) -> Tensor:
        return self._once("image_to_text", lambda: self._scale("cross") * (self.t_v @ self.s_t.T))

    def text_to_image(self) -> Tensor:
        return self._once("text_to_image", lambda: self._scale("cross") * (self.t_t @ self.s_v.T))

    def image_to_image(self) -> Tensor:
        return self._once("image_to_image", lambda: self._scale("image") * (self.t_v @ self.s_v.T))

    def text_to_text(self) -> Tensor:
        return self._once("text_to_text", lambda: self._scale("text") * (self.t_t @ self.s_t.T))

    def _scale(self, name: str) -> Tensor:
        return self._scales.multiplier(self._scales.get_parameter(name))

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if name not in self._computed:
            # Autocast would take the products in half precision, where neighbouring logits become equal.
            with torch.autocast(self.s_v.device.type, enabled=False):
                self._computed[name] = compute()
        return self._computed[name]


_TERMS: dict[str, Callable[[_Products], Tensor]] = {
    "task": lambda p: symmetric_contrastive(p.student()),
    "fd": lambda p: feature_distillation(p.s_v, p.s_t, p.t_v, p.t_t),
    "icl": lambda p: interactive_contrastive(p.text_to_image().T, p.image_to_text().T),
    "hrd": lambda p: relation_divergence(p.teacher(), p.student()),
    "affinity": lambda p: affinity_mimicking(p.teacher(), p.student()),
    "vrd_kl": lambda p: relation_divergence(p.text_to_text(), p.image_to_image()),
    "vrd_ce_image": lambda p: symmetric_contrastive(p.image_to_image()),
    "vrd_ce_text": lambda p: symmetric_contrastive(p.text_to_text()),
    "xrd": lambda p: cross_relation_divergence(p.image_to_text(), p.text_to_image()),
}


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
