"""The teacher during training: frozen, in its own preprocessing, asked no caption twice."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_rd_edge.contract.encoder import in_batches
from clip_rd_edge.models.clip import ClipModel, ImageTower, TextTower, to_device

# Captions are embedded this many at once, the last few padded: a product's last bits may depend on its shape, and a
# resumed run has to see the same bits as an uninterrupted one.
CHUNK = 32
# Captions whose embeddings are kept: 100,000 of 512 floats are 200 MB.
REMEMBERED_CAPTIONS = 100_000


class Teacher:
    """Embeds batches without gradients.

    A caption is no augmentation: its embedding is the same each epoch, so it is computed once and kept, in float32, up
    to REMEMBERED_CAPTIONS of them.
    """

    def __init__(self, clip: ClipModel, device: torch.device, *, autocast: torch.dtype | None) -> None:
        self.clip = clip
        self.logit_scale = clip.logit_scale
        self._image_tower = ImageTower(to_device(clip.model, device).eval())
        self._text_tower = TextTower(clip.model)
        self._device, self._autocast = device, autocast
        self._captions: dict[str, Tensor] = {}

    @torch.no_grad()
    def embed_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, D), L2-normalised."""
        pixels = pixels.to(self._device, memory_format=torch.channels_last, non_blocking=True)
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            embeddings: Tensor = self._image_tower(pixels)
        return embeddings

    @torch.no_grad()
    def embed_captions(self, captions: list[str]) -> Tensor:
        """B captions to (B, D), L2-normalised."""
        unknown = list(dict.fromkeys(caption for caption in captions if caption not in self._captions))
        fresh: dict[str, Tensor] = {}
        for part in in_batches(len(unknown), CHUNK):
            chunk = unknown[part]
            ids = self.clip.tokenizer(chunk + [""] * (CHUNK - len(chunk))).to(self._device)
            with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
                fresh.update(zip(chunk, self._text_tower(ids)[: len(chunk)], strict=True))
        embeddings = torch.stack([fresh[c] if c in fresh else self._captions[c] for c in captions])
        for caption, embedding in fresh.items():
            if len(self._captions) < REMEMBERED_CAPTIONS:
                self._captions[caption] = embedding
        return embeddings
