"""An encoder with a picture and a text at hand: each step of an answer as a call that can be timed."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from clip_rd_edge.benchmarking.metrics import Interval
from clip_rd_edge.contract.encoder import TowerEncoder, greatest, normalise, probabilities
from clip_rd_edge.contract.images import ImageFile, open_image
from clip_rd_edge.contract.preprocess import preprocess
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.host import OtherLoad
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.timing import Milliseconds, time_in_turn, warm_up

TEXT = "a photo of a cat"
_BEST = 5  # labels of an answer


class Opened:
    """What is timed of an encoder.

    Args:
        picture: a file.
        labels: how many there are to choose from; random embeddings, whose arithmetic takes as long as any.

    Raises:
        InputError: the picture cannot be read.
    """

    def __init__(self, encoder: TowerEncoder, picture: ImageFile, labels: int) -> None:
        self.encoder = encoder
        self._picture = picture
        self._image = open_image(picture)
        description = encoder.describe()
        self._how, self._logit_scale = description.preprocessing, description.logit_scale
        # Stacked, as encoders do it: `[None]` has other strides, which torch runs up to 1.5 times slower.
        self.pixels = np.stack([preprocess(self._image, self._how)])
        self._ids = encoder.tokenize([TEXT])
        rng = np.random.default_rng(0)
        self._labels = normalise(rng.standard_normal((labels, description.embedding_size)))
        self._embedding = self._labels[:1]

    def embed_image(self) -> object:
        """Pixels to embedding."""
        return self.encoder.encode_pixels(self.pixels)

    def embed_text(self) -> object:
        """Token ids to embedding."""
        return self.encoder.encode_ids(self._ids)

    def decode(self) -> object:
        """File to pixels."""
        return open_image(self._picture)

    def preprocess(self) -> object:
        """Resize, crop, normalise."""
        return preprocess(self._image, self._how)

    def classify(self) -> object:
        """Embedding to the best labels."""
        return greatest(probabilities(self._embedding, self._labels, self._logit_scale)[0], _BEST)

    def answer(self) -> object:
        """File to the best labels, as a device does it."""
        embedding = self.encoder.encode_images([open_image(self._picture)])
        return greatest(probabilities(embedding, self._labels, self._logit_scale)[0], _BEST)


RESAMPLES = 1_000
_QUANTILES = (50, 95, 99)


class Percentiles(msgspec.Struct, frozen=True):
    """Of repeated calls, in milliseconds.

    Attributes:
        p50_interval, p95_interval, p99_interval: 95 %, by bootstrap over sittings and over the calls of each.
        sittings: the p50 of each sitting, in the order of time.

    Results of format version 1 have p50 and p95 alone.
    """

    p50: float
    p95: float
    p99: float | None = None
    p50_interval: Interval | None = None
    p95_interval: Interval | None = None
    p99_interval: Interval | None = None
    sittings: tuple[float, ...] = ()


def percentiles(sittings: Sequence[Milliseconds], *, seed: int = 0) -> Percentiles:
    """Quantiles of S sittings' latencies.

    Calls of one sitting have more in common with each other than with those of the next, so that the bootstrap draws
    sittings first and calls within them after: drawing calls alone would promise too narrow an interval.
    """
    p50, p95, p99 = (float(value) for value in np.percentile(np.concatenate(sittings), _QUANTILES))
    drawn = _resampled(sittings, np.random.default_rng(seed))
    low, high = np.percentile(np.percentile(drawn, _QUANTILES, axis=1), [2.5, 97.5], axis=1)
    at50, at95, at99 = (Interval(float(a), float(b)) for a, b in zip(low, high, strict=True))
    return Percentiles(p50, p95, p99, at50, at95, at99, medians(sittings))


def medians(sittings: Sequence[Milliseconds]) -> tuple[float, ...]:
    """The p50 of each sitting."""
    return tuple(float(np.median(sitting)) for sitting in sittings)


def _resampled(sittings: Sequence[Milliseconds], rng: np.random.Generator) -> Milliseconds:
    """Bootstrap samples, (RESAMPLES, S × calls of the shortest sitting)."""
    calls = min(map(len, sittings))
    table = np.stack([sitting[:calls] for sitting in sittings])
    shape = (RESAMPLES, len(sittings), calls)
    chosen = rng.integers(0, len(sittings), shape[:2])[:, :, None]
    drawn: Milliseconds = table[chosen, rng.integers(0, calls, shape)]
    return drawn.reshape(RESAMPLES, -1)


REFERENCE = "\0reference"  # no row's label
# onnx.helper's model of one node, y = MatMul(x, w), opset 17, IR version 8: a device has no `onnx` to make it with.
MODEL = base64.b64decode(
    "CAgSADpjChEKAXgKAXcSAXkiBk1hdE11bBIJcmVmZXJlbmNlWhUKAXgSEAoOCAESCgoDEgFOCgMSAUtaFQoBdxIQCg4IARIKCgMSAUsKAxIBTWIV"
    "CgF5EhAKDggBEgoKAxIBTgoDEgFNQgQKABAR"
)
# 134 million operations on 4.8 MB: one or two milliseconds on a core of a server, and more than its own cache holds.
SHAPES = {"x": (64, 512), "w": (512, 2048)}


def reference_call(*, threads: int | None) -> Callable[[], object]:
    """The work, on as many threads as the models have."""
    session = open_session(MODEL, threads=threads)
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    return lambda: session.run(None, feed)


SITTINGS = 10
_LEAST_ROUNDS = 2  # a sitting
_ROUNDS_OF_STEPS, _SECONDS_OF_STEPS = 50, 3.0
Calls = dict[str, Callable[[], object]]


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """What stands before and behind the image tower, p50 in milliseconds.

    Attributes:
        decode: a picture's file to its pixels.
        preprocess: resizing, cropping, normalising.
        classify: an embedding to the best of `labels` labels.
    """

    decode: float
    preprocess: float
    classify: float
    labels: int


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """One encoder at batch 1, in milliseconds.

    Attributes:
        image, text: a tower alone, from pixels or token ids to an embedding.
        end_to_end: a picture's file to its label: reading, decoding, resizing, image tower, classifying; to its
            embedding where there are no `steps`, as in results of format version 1.
        rounds: how often each was timed.
        threads: what the encoders were opened with; None means every core.
    """

    image: Percentiles
    text: Percentiles
    end_to_end: Percentiles
    rounds: int
    threads: int | None
    steps: Steps | None = None


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """The p50 of the reference in each sitting, in milliseconds, timed beside each of the three."""

    image: tuple[float, ...]
    text: tuple[float, ...]
    end_to_end: tuple[float, ...]


class Latencies(NamedTuple):
    """Of all encoders of a run, by label, and of the reference beside them.

    Attributes:
        other_load: part of the machine's time that other processes took meanwhile; None where it is not told.
    """

    rows: dict[str, Latency]
    reference: Reference
    other_load: float | None


def measure_latencies(
    encoders: Mapping[str, TowerEncoder],
    picture: ImageFile,
    *,
    labels: int = 1_000,
    threads: int | None = None,
    rounds: int = 50,
    max_seconds: float = 20.0,
    reporter: Reporter = SILENT,
) -> Latencies:
    """Time all encoders in turn, so that a machine that slows down slows all alike.

    Image tower, text tower and end to end take turns in SITTINGS sittings: what disturbs the machine for some seconds
    meets one sitting of each, and shows in how far the sittings lie apart.

    Args:
        encoders: by label.
        picture: the file for end-to-end times, and the towers' input.
        labels: among which it is classified.
        threads: what the encoders were opened with: it is written down, not set.
        rounds: how often each call is timed, at most.
        max_seconds: for each of image tower, text tower and end to end.
        reporter: told how many sittings are done.

    Raises:
        InputError: the picture cannot be read.
    """
    opened = {label: Opened(encoder, picture, labels) for label, encoder in encoders.items()}
    kinds = _kinds(opened, threads)
    for call in (call for calls in kinds for call in calls.values()):
        warm_up(call)
    others = OtherLoad()
    sizes = [len(part) for part in np.array_split(np.arange(rounds), min(SITTINGS, rounds))]
    timed: list[dict[str, list[Milliseconds]]] = [{name: [] for name in calls} for calls in kinds]
    for sitting, size in enumerate(sizes):
        reporter.update("Latency", sitting, len(sizes))
        for calls, found in zip(kinds, timed, strict=True):
            seconds = max_seconds / len(sizes)
            times = time_in_turn(calls, rounds=size, warmup=1, max_seconds=seconds, least=_LEAST_ROUNDS)
            for name, samples in times.items():
                found[name].append(samples)
    reporter.update("Latency", len(sizes), len(sizes))
    steps = _steps(opened, labels, rounds=min(rounds, _ROUNDS_OF_STEPS))
    rows = {label: _latency([found[label] for found in timed], steps[label], threads=threads) for label in encoders}
    reference = Reference(**dict(zip(_KINDS, (medians(found[REFERENCE]) for found in timed), strict=True)))
    return Latencies(rows, reference, others.share())


_KINDS = ("image", "text", "end_to_end")


def _kinds(opened: Mapping[str, Opened], threads: int | None) -> tuple[Calls, Calls, Calls]:
    """What is timed side by side: image towers, text towers, the whole way, each with the reference first."""
    reference = reference_call(threads=threads)
    images, texts, whole = ({REFERENCE: reference} for _ in _KINDS)
    for label, each in opened.items():
        images[label], texts[label], whole[label] = each.embed_image, each.embed_text, each.answer
    return images, texts, whole


def _steps(opened: Mapping[str, Opened], labels: int, *, rounds: int) -> dict[str, Steps]:
    kinds: tuple[Calls, ...] = (
        {label: each.decode for label, each in opened.items()},
        {label: each.preprocess for label, each in opened.items()},
        {label: each.classify for label, each in opened.items()},
    )
    times = [time_in_turn(calls, rounds=rounds, max_seconds=_SECONDS_OF_STEPS) for calls in kinds]
    found = {label: [float(np.median(samples[label])) for samples in times] for label in opened}
    return {
        label: Steps(decode=decode, preprocess=preprocess, classify=classify, labels=labels)
        for label, (decode, preprocess, classify) in found.items()
    }


def _latency(timed: Sequence[list[Milliseconds]], steps: Steps, *, threads: int | None) -> Latency:
    image, text, end_to_end = map(percentiles, timed)
    rounds = min(sum(map(len, sittings)) for sittings in timed)
    return Latency(image=image, text=text, end_to_end=end_to_end, rounds=rounds, threads=threads, steps=steps)
