"""The teacher during training: frozen, in its own preprocessing, asked no caption twice; or read from a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from clip_rd_edge.contract.encoder import in_batches
from clip_rd_edge.distillation.loader import Batch
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


# Captions are embedded this many at once, the last few padded: a product's last bits may depend on its shape, and a
# resumed run has to see the same bits as an uninterrupted one.
CHUNK = 32
# Captions whose rows are kept: 100,000 of 512 floats are 200 MB.
REMEMBERED = 100_000


class CaptionMemory:
    """Rows of captions, (N, D), computed without gradient when first asked for.

    Args:
        encode: token ids (CHUNK, T) to rows (CHUNK, D), on `device`.
        autocast: what `encode` runs in; None for float32.
    """

    def __init__(
        self,
        tokenizer: Callable[[list[str]], Tensor],
        encode: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        autocast: torch.dtype | None,
    ) -> None:
        self._tokenizer, self._encode = tokenizer, encode
        self._device, self._autocast = device, autocast
        self._rows: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> Tensor:
        unknown = list(dict.fromkeys(caption for caption in captions if caption not in self._rows))
        fresh: dict[str, Tensor] = {}
        for part in in_batches(len(unknown), CHUNK):
            chunk = unknown[part]
            ids = self._tokenizer(chunk + [""] * (CHUNK - len(chunk))).to(self._device)
            with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
                rows = self._encode(ids).float()
            fresh.update(zip(chunk, rows, strict=False))
        stacked = torch.stack([fresh[c] if c in fresh else self._rows[c] for c in captions])
        for caption, row in fresh.items():
            if len(self._rows) < REMEMBERED:
                self._rows[caption] = row.clone()  # a view would keep its whole chunk
        return stacked


class FrozenTextTower:
    """A text tower of which only the projection learns: what comes before it is remembered a caption."""

    def __init__(self, clip: ClipModel, device: torch.device, *, autocast: torch.dtype | None) -> None:
        self._text = clip.model.get_submodule("text")
        self._name = projection_name(self._text)
        self._unprojected = CaptionMemory(clip.tokenizer, self._encode, device, autocast=autocast)

    def __call__(self, captions: list[str]) -> Tensor:
        """B captions to embeddings (B, D), L2-normalised, with a graph through the projection."""
        features = self._unprojected(captions)
        projection = getattr(self._text, self._name)
        projected = projection(features) if isinstance(projection, nn.Module) else features @ projection
        return nn.functional.normalize(projected.float(), dim=-1)

    def _encode(self, ids: Tensor) -> Tensor:
        projection = getattr(self._text, self._name)
        setattr(self._text, self._name, nn.Identity() if isinstance(projection, nn.Module) else None)
        try:
            features: Tensor = self._text(ids)
        finally:
            setattr(self._text, self._name, projection)
        return features


def projection_name(text: nn.Module) -> str:
    """Attribute of an open_clip text tower that holds its last projection: a module or a parameter."""
    # `proj` in towers from Hugging Face, `text_projection` in open_clip's own.
    return "proj" if hasattr(text, "proj") else "text_projection"


def freeze_all_but_projection(text: nn.Module) -> None:
    """Let a text tower learn nothing but its projection, and drop nothing out."""
    projection = getattr(text, projection_name(text))
    kept = {id(projection)} if isinstance(projection, nn.Parameter) else {id(p) for p in projection.parameters()}
    for parameter in text.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    text.eval()
