"""The teacher during training: frozen, in its own preprocessing, asked no caption twice."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_rd_edge.distill.captions import CaptionMemory
from clip_rd_edge.models.clip import ClipModel, ImageTower, TextTower, to_device


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

    @torch.no_grad()
    def embed_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, D), L2-normalised."""
        pixels = pixels.to(self._device, memory_format=torch.channels_last, non_blocking=True)
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            embeddings: Tensor = self._image_tower(pixels)
        return embeddings
