"""The teacher during training: frozen, in its own preprocessing, asked no caption twice; or read from a cache."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from clip_rd_edge.distill.captions import CaptionMemory
from clip_rd_edge.distill.loader import Batch
from clip_rd_edge.models.clip import ClipModel, ImageTower, TextTower, to_device


class TeacherOfBatches(Protocol):
    """What a step needs of a teacher. `logit_scale` is γ_t, a multiplier."""

    logit_scale: float

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's image and text embeddings of a batch, (B, D) each, L2-normalised, without graph."""
        ...


class Teacher:
    """Embeds batches without gradients.

    Attributes:
        embed_captions: B captions to (B, D), L2-normalised; see `CaptionMemory`.
    """

    def __init__(self, clip: ClipModel, device: torch.device, *, autocast: torch.dtype | None) -> None:
        self.clip = clip
        self.logit_scale = clip.logit_scale
        self._image_tower = ImageTower(to_device(clip.model, device).eval())
        self._device, self._autocast = device, autocast
        self.embed_captions = CaptionMemory(clip.tokenizer, TextTower(clip.model), device, autocast=autocast)

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `TeacherOfBatches`."""
        if batch.teacher_pixels is None:
            raise ValueError("The batch was loaded without pictures for the teacher.")
        return self.embed_images(batch.teacher_pixels), self.embed_captions(batch.captions)

    @torch.no_grad()
    def embed_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, D), L2-normalised."""
        pixels = pixels.to(self._device, memory_format=torch.channels_last, non_blocking=True)
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            embeddings: Tensor = self._image_tower(pixels)
        return embeddings


class CachedTeacher:
    """Hands on what the loader read from a teacher cache."""

    def __init__(self, logit_scale: float, device: torch.device) -> None:
        self.logit_scale, self._device = logit_scale, device

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `TeacherOfBatches`."""
        if batch.teacher_rows is None:
            raise ValueError("The batch was loaded without the teacher's cache.")
        image, text = (rows.to(self._device).float() for rows in batch.teacher_rows)
        return image, text
