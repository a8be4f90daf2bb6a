"""A teacher that chooses the texts to train with: for images without captions, those that fit best."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_rd_edge.data.load import names_shards
from clip_rd_edge.data.pairs import Pairs
from clip_rd_edge.data.unpaired import MixedSamples
from clip_rd_edge.distillation.batches.loader import Batch
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.teachers.teacher import BatchTeacher, Targets
from clip_rd_edge.models.text_towers import embed_with_progress
from clip_rd_edge.utils.reporting import SILENT, Reporter

# Max number of texts to choose from, for the sake of time: all are embedded before the first step.
MAX_TEXTS = 16_384
# One in so many rows keeps its text in turn: otherwise, the student would never see a text that fits no image, and yet
# have to tell it from those that do.
KEPT_ROWS = 4


class ChoosingTeacher:
    """Puts the texts that the teacher finds most similar beside images without captions; implements `BatchTeacher`.

    Among texts in turn, one that fits an image is rarely in the batch, and the teacher's scores say little. DIME-FM
    (Sun et al. 2023) likewise trains with texts that its teacher finds similar to the images. What the teacher chose is
    no caption: terms that need pairs still leave these rows out.

    Args:
        teacher: the teacher.
        texts: T texts to choose from, each with one or more prompts.
        embed: maps N prompts to the teacher's embeddings, (N, D), L2-normalised.
        reporter: receives the progress of embedding the texts.
    """

    def __init__(
        self,
        teacher: BatchTeacher,
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
        """See `BatchTeacher`; in rows that are no pairs, texts that fit stand for the batch's.

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


def texts_to_choose_from(config: RunConfig, samples: Pairs) -> list[tuple[str, ...]]:
    """Return the texts for images without captions, each in its prompts; without texts, the captions of pairs.

    Of more than MAX_TEXTS, a random sample. Empty if there are no such images, or if there are only captions in shards,
    which could not be read without fetching all images.
    """
    if not isinstance(samples, MixedSamples) or samples.images is None:
        return []
    if not samples.texts and names_shards(str(config.data)):
        return []
    count, rng = len(samples.texts) or samples.pair_count, np.random.default_rng(config.seed)
    chosen = np.sort(rng.choice(count, min(count, MAX_TEXTS), replace=False, shuffle=False)).tolist()
    if samples.texts:
        return [samples.prompts(samples.texts[number]) for number in chosen]
    captions = dict.fromkeys(caption for number in chosen for caption in samples.captions(number))
    return [(caption,) for caption in captions]
