"""How long one picture and one text take, of several encoders in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import msgspec
import numpy as np

from clip_rd_edge.contract.encoder import TowerEncoder
from clip_rd_edge.contract.preprocess import Picture, open_image, preprocess
from clip_rd_edge.runtime.timing import Milliseconds, time_in_turn

TEXT = "a photo of a cat"


class Percentiles(msgspec.Struct, frozen=True):
    """Of repeated calls, in milliseconds."""

    p50: float
    p95: float


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """One encoder at batch 1, in milliseconds.

    Attributes:
        image, text: a tower alone, from pixels or token ids to an embedding.
        end_to_end: a picture's file to its embedding: reading, decoding, resizing, image tower.
        rounds: how often each was timed.
        threads: what the encoders were opened with; None means every core.
    """

    image: Percentiles
    text: Percentiles
    end_to_end: Percentiles
    rounds: int
    threads: int | None


def measure_latencies(
    encoders: Mapping[str, TowerEncoder],
    picture: Picture,
    *,
    threads: int | None = None,
    rounds: int = 50,
    max_seconds: float = 20.0,
) -> dict[str, Latency]:
    """Time all encoders in turn, so that a machine that slows down slows all alike.

    Args:
        encoders: by label.
        picture: the file for end-to-end times, and the towers' input.
        threads: what the encoders were opened with: it is written down, not set.
        rounds: how often each call is timed, at most.
        max_seconds: for each of image tower, text tower and end to end.

    Raises:
        InputError: the picture cannot be read.
    """
    image = open_image(picture)
    images: dict[str, Callable[[], object]] = {}
    texts: dict[str, Callable[[], object]] = {}
    whole: dict[str, Callable[[], object]] = {}
    for label, encoder in encoders.items():
        # Stacked, as encoders do it: `[None]` has other strides, which torch runs up to 1.5 times slower.
        pixels = np.stack([preprocess(image, encoder.describe().preprocessing)])
        images[label] = partial(encoder.encode_pixels, pixels)
        texts[label] = partial(encoder.encode_ids, encoder.tokenize([TEXT]))
        whole[label] = partial(_end_to_end, encoder, picture)
    # One kind after the other: what is compared is timed side by side.
    timed = [time_in_turn(calls, rounds=rounds, max_seconds=max_seconds) for calls in (images, texts, whole)]
    return {
        label: Latency(
            image=_percentiles(timed[0][label]),
            text=_percentiles(timed[1][label]),
            end_to_end=_percentiles(timed[2][label]),
            rounds=min(len(samples[label]) for samples in timed),
            threads=threads,
        )
        for label in encoders
    }


def _end_to_end(encoder: TowerEncoder, picture: Picture) -> object:
    return encoder.encode_images([open_image(picture)])


def _percentiles(samples: Milliseconds) -> Percentiles:
    p50, p95 = np.percentile(samples, [50, 95])
    return Percentiles(float(p50), float(p95))
