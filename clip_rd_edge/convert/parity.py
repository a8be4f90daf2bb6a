"""How well two sets of embeddings of the same things agree. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.bundle import Measurement
from clip_rd_edge.contract.encoder import Embeddings, in_batches
from clip_rd_edge.contract.preprocess import Pixels, Preprocessing
from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils.host import machine_name
from clip_rd_edge.utils.timing import Milliseconds, time_in_turn

Rows = npt.NDArray[np.float64]
Answers = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Agreement:
    """Of N embeddings with N others.

    Attributes:
        max_difference: greatest absolute difference of an entry.
        cosine: mean cosine of embedding to embedding.
        centred_cosine: the same after each side's mean embedding is taken away. CLIP embeddings share a large mean,
            so that raw cosine stays near 1 even where a tower has collapsed to that mean.
        samples: N.
    """

    max_difference: float
    cosine: float
    centred_cosine: float
    samples: int


def agreement(reference: Embeddings, other: Embeddings) -> Agreement:
    """Compare two sets of embeddings, both (N, D), row by row.

    An embedding that is not finite agrees with nothing: its cosines count as 0 and the greatest difference is infinite.

    Raises:
        UsageError: the shapes differ, or N is below 2, where nothing is left when the mean is taken away.
    """
    if reference.shape != other.shape or reference.ndim != 2 or len(reference) < 2:
        raise UsageError(
            f"Embeddings of shapes {reference.shape} and {other.shape} cannot be compared; "
            "expected the same (N, D) with N of 2 or more."
        )
    # float16 overflow and bad scales give NaN, which would otherwise pass every `<` that guards a threshold.
    if not (np.isfinite(reference).all() and np.isfinite(other).all()):
        return Agreement(float("inf"), 0.0, 0.0, len(reference))
    a, b = reference.astype(np.float64), other.astype(np.float64)
    return Agreement(
        max_difference=float(np.abs(a - b).max()),
        cosine=_mean_cosine(a, b),
        centred_cosine=_mean_cosine(a - a.mean(axis=0), b - b.mean(axis=0)),
        samples=len(a),
    )


def matched(pictures: Embeddings, captions: Embeddings) -> Answers:
    """Which of N pictures have their own caption nearest among all N: both (N, D), row by row a pair.

    A caption that another pair has, too, counts as either's own.
    """
    similarities = pictures.astype(np.float64) @ captions.astype(np.float64).T
    own = np.diagonal(similarities)
    right: Answers = own >= similarities.max(axis=1) - 1e-6  # rounding sets equal captions apart
    return right


def _mean_cosine(a: Rows, b: Rows) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean(np.sum(a * b, axis=1) / np.maximum(norms, 1e-24)))


# Short, long, too long, none at all, and what tokenizers trip over: texts that towers and tokenizers are compared on.
PROBES = (
    "a photo of a cat",
    "",
    "two dogs, running through tall grass at the edge of a lake",
    "it's 1984 &amp; they'll  meet — don't you?",
    "Überraschung! 猫と犬 👩‍🚀 café",
    "red",
    "!<end_of_text> <end_of_text> <start_of_text>",
    "word " * 300,
)


def hard_pixels(how: Preprocessing) -> Pixels:
    """Preprocessed pictures (8, 3, H, W) that reach the ends of what a picture can hold.

    White, black, red, checks of 1 and of 16 pixels, noise at full contrast, noise in the middle, a gradient.
    """
    height, width = how.size
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    pictures = np.stack(
        [
            np.ones((3, height, width)),
            np.zeros((3, height, width)),
            np.stack([np.ones((height, width)), np.zeros((height, width)), np.zeros((height, width))]),
            np.broadcast_to((rows + columns) % 2, (3, height, width)),
            np.broadcast_to((rows // 16 + columns // 16) % 2, (3, height, width)),
            rng.integers(0, 2, (3, height, width)),
            rng.uniform(0, 1, (3, height, width)),
            np.broadcast_to(columns / max(width - 1, 1), (3, height, width)),
        ]
    )
    mean, std = (np.asarray(values)[:, None, None] for values in (how.mean, how.std))
    pixels: Pixels = ((pictures - mean) / std).astype(np.float32)
    return pixels


Inputs = npt.NDArray[np.float32] | npt.NDArray[np.int64]
# Times some calls in turn: `runtime.timing.time_in_turn`, or a stand-in.
Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, Milliseconds]]
BATCH_SIZE = 16


def embed(session: Any, inputs: Inputs, *, batch_size: int = BATCH_SIZE) -> Embeddings:
    """A tower's embeddings (N, D) of its inputs, run in batches."""
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: inputs[batch]})[0] for batch in in_batches(len(inputs), batch_size)]
    joined: Embeddings = np.concatenate(parts)
    return joined


def latencies(sessions: Mapping[str, Any], one: Inputs, *, timer: Timer = time_in_turn) -> Mapping[str, Milliseconds]:
    """Latency in milliseconds of each session on the same input of batch 1, all timed in turn."""
    feed = {name: {session.get_inputs()[0].name: one[:1]} for name, session in sessions.items()}
    return timer({name: _call(session, feed[name]) for name, session in sessions.items()})


def lowest_tenth(times: Milliseconds) -> float:
    """What candidates are compared by: on a busy machine what runs longer than a time slice is interrupted almost
    always, and its median tells of the other programs."""
    return float(np.percentile(times, 10))


def measurement(of: Agreement, times: Milliseconds, *, reference: Milliseconds, threads: int) -> Measurement:
    """As the manifest keeps it; `reference` are the float32 tower's latencies, timed in turn with `times`."""
    return Measurement(
        latency_ms_p50=float(np.median(times)),
        latency_ms_p95=float(np.percentile(times, 95)),
        speedup=float(np.median(reference) / np.median(times)),
        max_difference=of.max_difference,
        cosine=of.cosine,
        centred_cosine=of.centred_cosine,
        samples=of.samples,
        threads=threads,
        machine=machine_name(),
    )


def _call(session: Any, feed: dict[str, Inputs]) -> Callable[[], object]:
    return lambda: session.run(None, feed)
