"""Evaluate a student during its training, by all processes of the run together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from clip_rd_edge.bundle.encoder import Description, Embeddings, Encoder, as_list, in_batches
from clip_rd_edge.distillation.processes.distributed import Processes
from clip_rd_edge.distillation.processes.signals import Stopped, StopRequest
from clip_rd_edge.errors import InputError

TEXT_BATCH = 64


class EncoderOfAllProcesses:
    """Runs an encoder, the same one in each process, on batches that the processes take in turn.

    Implements `bundle.encoder.SharedEncoder`. Batches are those of a single process, so that scores do not depend on
    the number of processes. All processes notice after each round of batches what happened to one of them.

    Args:
        request: a signal that stops the evaluation in all processes; in a single one, the signal itself does.
    """

    def __init__(self, encoder: Encoder, processes: Processes, request: StopRequest) -> None:
        self._encoder, self._processes, self._request = encoder, processes, request

    def describe(self) -> Description:
        """Describe the encoder."""
        return self._encoder.describe()

    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        """Embed images in this process alone."""
        return self._encoder.encode_images(images)

    def encode_texts(self, texts: str | Sequence[str]) -> Embeddings:
        """Embed texts, which are the same in all processes, in all of them."""
        texts = as_list(texts)
        batches = in_batches(len(texts), TEXT_BATCH)
        return self.share(batches, lambda batch: self._encoder.encode_texts(texts[batch]))

    def share(self, batches: Sequence[slice], embed: Callable[[slice], Embeddings]) -> Embeddings:
        """See `SharedEncoder`."""
        processes = self._processes
        counts = processes.gather_objects(len(batches))
        if len(set(counts)) > 1:
            raise InputError(
                f"The processes of the run have different evaluation data: {counts} batches.",
                hint="give all machines the same files",
            )
        rows = []
        for first in range(0, len(batches), processes.world_size):
            own = batches[first : first + processes.world_size][processes.rank : processes.rank + 1]
            with processes.together():
                embeddings = [] if self._request else [embed(batch) for batch in own]
            if processes.any(bool(self._request)):
                raise Stopped
            rows += [part for parts in processes.gather_objects(embeddings) for part in parts]
        return np.concatenate(rows)
