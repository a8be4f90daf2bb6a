"""One training step, from a batch to gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clip_rd_edge.distill.loader import Batch
from clip_rd_edge.distill.teacher import Teacher
from clip_rd_edge.losses.objective import EmbeddingBatch, LossTerms, Objective
from clip_rd_edge.models.clip import ClipModel, ImageTower, TextTower


@dataclass(frozen=True)
class StepResult:
    """What a step computed: the terms, and the embeddings it compared, for the geometry figures."""

    loss: LossTerms
    embeddings: EmbeddingBatch


class TrainingStep:
    """Embeds a batch with student and teacher and computes the loss; the caller propagates it back.

    Args:
        teacher: None where the objective needs none.
        autocast: what the towers run in; None for float32. The objective is float32 always.
    """

    def __init__(
        self,
        student: ClipModel,
        teacher: Teacher | None,
        objective: Objective,
        device: torch.device,
        *,
        autocast: torch.dtype | None,
    ) -> None:
        self.student, self.teacher, self.objective = student, teacher, objective
        self._image_tower, self._text_tower = ImageTower(student.model), TextTower(student.model)
        self._device, self._autocast = device, autocast

    def __call__(self, batch: Batch) -> StepResult:
        embeddings = self._embed(batch)
        student_scale = self.student.model.get_parameter("logit_scale").exp()
        loss = self.objective(embeddings, student_scale, self.teacher.logit_scale if self.teacher else 0.0)
        return StepResult(loss, embeddings)

    def with_autocast(self, autocast: torch.dtype | None) -> TrainingStep:
        """The same step in another precision."""
        teacher = self.teacher.with_autocast(autocast) if self.teacher else None
        return TrainingStep(self.student, teacher, self.objective, self._device, autocast=autocast)

    def _embed(self, batch: Batch) -> EmbeddingBatch:
        ids = self.student.tokenizer(batch.captions).to(self._device)
        pixels = batch.student_pixels.to(self._device, memory_format=torch.channels_last, non_blocking=True)
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            image, text = self._image_tower(pixels), self._text_tower(ids)
        if self.teacher is None or batch.teacher_pixels is None:
            return EmbeddingBatch(image, text)
        teacher_image = self.teacher.embed_images(batch.teacher_pixels)
        return EmbeddingBatch(image, text, teacher_image, self.teacher.embed_captions(batch.captions))


@torch.no_grad()
def clamp_scales(student: nn.Module, objective: Objective) -> None:
    """Keep the student's logit scale within [1, 100], as CLIP does, and the objective's scales in their range."""
    scale: Tensor = student.get_parameter("logit_scale")
    scale.clamp_(0.0, 4.605170185988092)  # ln 100
    objective.scales.clamp_()
