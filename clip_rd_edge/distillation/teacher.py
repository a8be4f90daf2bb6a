"""The teachers of a run: frozen, with their own preprocessing and cached captions; or read from a store."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clip_rd_edge.bundle.encoder import in_batches
from clip_rd_edge.data.load import Mixed, names_shards
from clip_rd_edge.data.samples import Samples
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.pixels import Normaliser
from clip_rd_edge.errors import UsageError
from clip_rd_edge.losses.terms import Ensemble
from clip_rd_edge.models.clip import ClipModel, ImageTower, TextTower, to_device
from clip_rd_edge.models.encoder import CaptionTower, embed_with_progress
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.models.names import is_trained
from clip_rd_edge.utils.paths import Typed
from clip_rd_edge.utils.structs import read_json
from clip_rd_edge.utils.text import SILENT, Reporter

if TYPE_CHECKING:
    from clip_rd_edge.distillation.reinforced import StoredTeachers


def load_teachers(config: RunConfig) -> tuple[ClipModel, ...]:
    """Return the teachers of a run, none if its objective does not need one or their embeddings are stored."""
    if not config.recipe.objective.needs_teacher:
        return ()
    if not config.teachers:
        raise UsageError(
            f"The recipe {config.recipe_name} needs a teacher.",
            hint="{teacher} local-dir:PATH, or a name with {teacher_pretrained}; {recipe} clip trains without one",
            option="teacher",
        )
    if config.stored_teachers is not None:
        return ()
    return tuple(load_clip(name, pretrained=teacher_weights(config, name)) for name in config.teachers)


def teacher_weights(config: RunConfig, name: str) -> Typed | None:
    """Return `teacher_pretrained` for a teacher that is named by an architecture alone; the others have weights."""
    return None if is_trained(name) else config.teacher_pretrained


def refuse_idle_teacher(config: RunConfig) -> None:
    """Raise UsageError if a teacher is named, or what belongs to one, but the recipe has none."""
    for name in ("teacher", "teacher_pretrained", "store"):
        if getattr(config, name) and not config.recipe.objective.needs_teacher:
            raise UsageError(
                f"The recipe {config.recipe_name} has no teacher, but {{{name}}} was named.",
                hint=f"omit {{{name}}}, or name a recipe with a teacher: {{recipe}} clip-rd",
                option=name,
            )


def load_stored_teachers(config: RunConfig) -> StoredTeachers | None:
    """Return the teachers whose embeddings are stored in the data; None if there are none, or none is needed."""
    if config.stored_teachers is None or not config.recipe.objective.needs_teacher:
        return None
    from clip_rd_edge.distillation.reinforced import StoredTeachers

    return read_json(Path(config.stored_teachers), StoredTeachers)


class Targets(NamedTuple):
    """A teacher's embeddings of a batch, (B, D) each, L2-normalised, without graph.

    Attributes:
        captions: the B texts of `text`, which the student is to embed: those of the batch, or others of its choice.
    """

    image: Tensor
    text: Tensor
    captions: list[str]


def ensemble_of(teachers: Sequence[ClipModel]) -> Ensemble:
    """Return how the embeddings of teachers, one or more, become those of one."""
    first, *others = teachers
    return Ensemble(
        tuple(teacher.embedding_size for teacher in teachers),
        tuple(teacher.logit_scale for teacher in teachers),
        share_text=bool(others) and all(_have_one_text_tower(first, other) for other in others),
    )


def _have_one_text_tower(first: ClipModel, second: ClipModel) -> bool:
    if first.context_length != second.context_length or first.embedding_size != second.embedding_size:
        return False
    one, other = map(_text_weights, (first, second))
    if one.keys() != other.keys() or not all(torch.equal(one[name], other[name]) for name in one):
        return False
    texts = ["A photo of two Dogs, asleep & well-fed!", "_naïve_ ⅷ"]  # tokenizers may clean texts in different ways
    return torch.equal(first.tokenizer(texts), second.tokenizer(texts))


def _text_weights(clip: ClipModel) -> dict[str, Tensor]:
    """Return all weights but those of the image tower and the scale: parts of a text tower may lie at the top level."""
    state = clip.model.state_dict()
    return {name: state[name] for name in state if not name.startswith(("visual.", "logit_"))}


# On a CPU, larger batches are no faster, and their padding costs more.
CPU_CAPTION_BATCH = 32


def caption_batch_size(images: int, device: torch.device) -> int:
    """Return the number of captions per pass through a frozen text tower: as many as there are images in theirs."""
    return CPU_CAPTION_BATCH if device.type == "cpu" else images


class Teacher:
    """Embeds images and captions without gradients.

    Args:
        autocast: dtype that the teacher runs in; None for float32.
        caption_batch: captions per pass through the text tower; see `caption_batch_size`.

    Attributes:
        embed_captions: maps B captions to (B, D), L2-normalised; see `CaptionCache`.
    """

    def __init__(
        self,
        clip: ClipModel,
        device: torch.device,
        *,
        autocast: torch.dtype | None,
        caption_batch: int = CPU_CAPTION_BATCH,
    ) -> None:
        self.clip, self.logit_scale = clip, clip.logit_scale
        self._image_tower = ImageTower(to_device(clip.model, device).eval())
        self._normalise = Normaliser(clip.preprocessing, device)
        self._device, self._autocast = device, autocast
        tower = CaptionTower(TextTower(clip.model), clip.model)
        self.embed_captions = CaptionCache(clip.tokenizer, tower, device, autocast=autocast, batch_size=caption_batch)

    @torch.no_grad()
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embed pixel values, (B, 3, H, W) uint8 to (B, D), L2-normalised; zeros if there are none (H = W = 0)."""
        if not pixels.numel():
            return torch.zeros(len(pixels), self.clip.embedding_size, device=self._device)
        pixels = self._normalise(pixels)
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            embeddings: Tensor = self._image_tower(pixels)
        return embeddings


class LiveTeacher:
    """One or more teachers as one (see `losses.terms`), each with its own tokenizer, preprocessing and image size.

    Attributes:
        logit_scale: γ_t, a multiplier, or those of several teachers.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self._teachers, self._ensemble = teachers, ensemble_of([teacher.clip for teacher in teachers])
        self.logit_scale = self._ensemble.logit_scale

    def embed(self, batch: Batch) -> Targets:
        """Embed the images and captions of a batch."""
        pixels = zip(self._teachers, batch.teacher_pixels, strict=True)
        images = [teacher.embed_images(own).float() for teacher, own in pixels]
        return Targets(
            self._ensemble.join(images), self.embed_captions(batch.captions, batch.teacher_ids), batch.captions
        )

    def embed_captions(self, captions: list[str], ids: Sequence[Tensor] = ()) -> Tensor:
        """Return the embeddings of N captions by all teachers as one, (N, D), L2-normalised.

        Args:
            ids: of each teacher's tokenizer, (N, T) each; without any, the captions are tokenised here.
        """
        tokenised = zip_longest(self._teachers, ids)
        return self._ensemble.join([teacher.embed_captions(captions, own) for teacher, own in tokenised])


class StoredTeacher:
    """As `LiveTeacher`, with the embeddings of all teachers that the loader read from their store."""

    def __init__(self, ensemble: Ensemble, device: torch.device) -> None:
        self.logit_scale = ensemble.logit_scale
        self._ensemble, self._device = ensemble, device

    def embed(self, batch: Batch) -> Targets:
        assert batch.teacher_embeddings is not None  # of a data set with a store
        widths = list(self._ensemble.teacher_widths)
        moved = (side.to(self._device, non_blocking=True).float() for side in batch.teacher_embeddings)
        sides = (torch.split(side, widths, dim=1) for side in moved)
        image, text = map(self._ensemble.join, sides)
        return Targets(image, text, batch.captions)


# Max number of captions in the cache: 100,000 rows of 512 floats are 200 MB.
MAX_CACHED_CAPTIONS = 100_000


class CaptionCache:
    """Maps N captions to rows (N, D). Each caption is computed once, without gradient, when first requested.

    A batch has captions of about the same length, and is padded to a fixed size for that length: the last bits of a
    matrix product may depend on its shape, and a resumed run, whose cache is empty, must reproduce an uninterrupted one
    bit for bit.

    Args:
        batch_size: of the shortest captions; for longer ones it is smaller.
    """

    def __init__(
        self,
        tokenizer: Callable[[list[str]], Tensor],
        tower: CaptionTower,
        device: torch.device,
        *,
        autocast: torch.dtype | None,
        batch_size: int = CPU_CAPTION_BATCH,
    ) -> None:
        self._tokenizer, self._tower, self._batch_size = tokenizer, tower, batch_size
        self._device, self._autocast, self._padding = device, autocast, tokenizer([""])
        self._rows: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, captions: list[str], ids: Tensor | None = None) -> Tensor:
        places = {caption: row for row, caption in enumerate(captions)}
        missing = [caption for caption in places if caption not in self._rows]
        own_ids = None if ids is None else ids[[places[caption] for caption in missing]]
        computed: dict[str, Tensor] = {}
        for batch, batch_ids, length in self._batches(missing, own_ids):
            with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
                rows = self._tower.compute(batch_ids, length).float()
            computed.update(zip(batch, rows, strict=False))
        stacked = torch.stack([computed[c] if c in computed else self._rows[c] for c in captions])
        for caption, row in computed.items():
            if len(self._rows) < MAX_CACHED_CAPTIONS:
                self._rows[caption] = row.clone()  # a view would keep the whole batch alive
        return stacked

    def _batches(self, captions: list[str], ids: Tensor | None) -> Iterator[tuple[list[str], Tensor, int]]:
        """Yield captions of one length, their ids with those of padding, and that length."""
        if not captions:
            return
        all_ids = self._tokenizer(captions) if ids is None else ids
        for length, rows in self._tower.rows_by_length(all_ids).items():
            # A last batch of each length, mostly padding, should not cost more than one of whole contexts.
            shortest = self._tower.choices[0] if self._tower.choices else length
            size = max(1, min(self._batch_size, self._batch_size * shortest // length))
            for part in in_batches(len(rows), size):
                own = rows[part]
                padded = torch.stack([*(all_ids[row] for row in own), *self._padding.expand(size - len(own), -1)])
                yield [captions[row] for row in own], padded, length


class FrozenTextTower:
    """A text tower in which only the projection is trained; the features before it are cached per caption."""

    def __init__(
        self, clip: ClipModel, device: torch.device, *, autocast: torch.dtype | None, caption_batch: int
    ) -> None:
        self._text = clip.model.get_submodule("text")
        self._projection_name = projection_name(self._text)
        tower = CaptionTower(_Features(self._text, self._projection_name), self._text)
        self._cached_features = CaptionCache(clip.tokenizer, tower, device, autocast=autocast, batch_size=caption_batch)

    def __call__(self, captions: list[str], ids: Tensor | None = None) -> Tensor:
        """Embed B captions, (B, D), L2-normalised, with a graph through the projection; `ids`: of its tokenizer."""
        features = self._cached_features(captions, ids)
        projection = getattr(self._text, self._projection_name)
        if isinstance(projection, nn.Module):
            features = projection(features)
        elif projection is not None:
            features = features @ projection
        return nn.functional.normalize(features.float(), dim=-1)


class _Features(nn.Module):
    """A text tower without its last projection."""

    def __init__(self, text: nn.Module, projection_name: str) -> None:
        super().__init__()
        self.text, self._projection_name = text, projection_name

    def forward(self, ids: Tensor) -> Tensor:
        projection = getattr(self.text, self._projection_name)
        # Towers from Hugging Face always call theirs; open_clip's own have None without one, whatever kind it was.
        setattr(self.text, self._projection_name, nn.Identity() if self._projection_name == "proj" else None)
        try:
            features: Tensor | tuple[Tensor, Tensor] = self.text(ids)
        finally:
            setattr(self.text, self._projection_name, projection)
        return features[0] if isinstance(features, tuple) else features  # CoCa's returns those of its tokens, too


def projection_name(text: nn.Module) -> str:
    """Return the attribute of an open_clip text tower that holds its last projection: a module, a parameter or None."""
    # `proj` in towers from Hugging Face, `text_projection` in open_clip's own towers.
    return "proj" if hasattr(text, "proj") else "text_projection"


# Max number of texts to choose from, for the sake of time: all are embedded before the first step.
MAX_TEXTS = 16_384
# One in so many rows keeps its text in turn: otherwise, the student would never see a text that fits no image, and yet
# have to tell it from those that do.
KEPT_ROWS = 4


class ChoosingTeacher:
    """As `LiveTeacher`, with the texts that the teacher finds most similar beside images without captions.

    If texts took turns, one that fits an image would rarely be in the batch, and the teacher's scores would mean
    little. DIME-FM (Sun et al. 2023) likewise trains with texts that its teacher finds similar to the images. What the
    teacher chose is not a caption: terms that need pairs still leave these rows out.

    Args:
        texts: T texts to choose from, each with one or more prompts.
        embed: maps N prompts to the teacher's embeddings, (N, D), L2-normalised.
    """

    def __init__(
        self,
        teacher: LiveTeacher | StoredTeacher,
        texts: Sequence[tuple[str, ...]],
        embed: Callable[[list[str]], Tensor],
        *,
        reporter: Reporter = SILENT,
    ) -> None:
        self.logit_scale = teacher.logit_scale
        self._teacher, self._texts = teacher, texts
        prompts = [prompt for group in texts for prompt in group]
        self._rows = embed_with_progress(prompts, embed, stage="embedding the texts to choose from", reporter=reporter)
        counts = torch.tensor([len(group) for group in texts], device=self._rows.device)
        self._first = (counts.cumsum(0) - counts).tolist()  # row of each text's first prompt
        of_text = torch.arange(len(texts), device=counts.device).repeat_interleave(counts)
        sums = self._rows.new_zeros(len(texts), self._rows.shape[1]).index_add_(0, of_text, self._rows)
        self._means = normalize(sums, dim=-1)

    def embed(self, batch: Batch) -> Targets:
        """Embed a batch; in rows that are not pairs, texts that fit replace the batch's.

        About one such row in KEPT_ROWS stays as it is. Which one depends on its crop, and which of a text's prompts is
        taken on the text that stood there: both change from view to view, but not with the division of a batch.
        """
        own = self._teacher.embed(batch)
        apart = [row for row, paired in enumerate(batch.paired or ()) if not paired]
        rows = [row for row in apart if int(batch.student_pixels[row].sum(dtype=torch.int64)) % KEPT_ROWS]
        if not rows:
            return own
        captions, text = list(own.captions), own.text.clone()
        chosen = (own.image[rows].float() @ self._means.T).argmax(dim=1).tolist()
        for row, number in zip(rows, chosen, strict=True):
            prompts = self._texts[number]
            prompt = zlib.crc32(captions[row].encode()) % len(prompts)
            captions[row], text[row] = prompts[prompt], self._rows[self._first[number] + prompt]
        return Targets(own.image, text, captions)


BatchTeacher = LiveTeacher | StoredTeacher | ChoosingTeacher


def texts_to_choose_from(config: RunConfig, samples: Samples) -> list[tuple[str, ...]]:
    """Return the texts for images without captions, each in its prompts; without texts, the captions of pairs.

    Of more than MAX_TEXTS, a random sample. Empty if there are no such images, or if there are only captions in shards,
    which could not be read without fetching all images.
    """
    if not isinstance(samples, Mixed) or samples.images is None:
        return []
    if not samples.texts and names_shards(str(config.data)):
        return []
    count, rng = len(samples.texts) or samples.counts.pairs, np.random.default_rng(config.seed)
    chosen = np.sort(rng.choice(count, min(count, MAX_TEXTS), replace=False, shuffle=False)).tolist()
    if samples.texts:
        return [samples.prompts(samples.texts[number]) for number in chosen]
    captions = dict.fromkeys(caption for number in chosen for caption in samples.read(number).captions)
    return [(caption,) for caption in captions]
