"""Latency of several encoders, timed in turn and beside a fixed reference workload; throughput, cold start."""

from __future__ import annotations

import base64
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.benchmarking.metrics import Interval
from clip_rd_edge.bundle.encoder import TowerEncoder, embeds_texts, normalise, top_indices
from clip_rd_edge.bundle.images import ImageFile, open_image
from clip_rd_edge.bundle.preprocess import preprocess
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.host import BackgroundLoad
from clip_rd_edge.utils.text import SILENT, Reporter
from clip_rd_edge.utils.timing import Milliseconds, time_in_turn, warm_up

TEXT = "a photo of a cat"
_TOP_K = 5  # labels of an answer


class EncoderCalls:
    """The steps from an image file to its labels as calls that can be timed, for one encoder, image and text.

    Args:
        labels: number of labels to classify among; their embeddings are random, which takes the same time.
    """

    def __init__(self, encoder: TowerEncoder, image: ImageFile, labels: int) -> None:
        self.encoder = encoder
        self._file = image
        self._image = open_image(image)
        description = encoder.describe()
        self._preprocessing, self._scoring = description.preprocessing, description.scoring
        # Stacked, as encoders do: `[None]` gives other strides, with which torch is up to 1.5 times slower.
        self.pixels = np.stack([preprocess(self._image, self._preprocessing)])
        self._ids = encoder.tokenize([TEXT]) if embeds_texts(encoder) else None
        rng = np.random.default_rng(0)
        self._labels = normalise(rng.standard_normal((labels, description.embedding_size)))
        self._embedding = self._labels[:1]

    def embed_image(self) -> object:
        return self.encoder.encode_pixels(self.pixels)

    def embed_text(self) -> object:
        return None if self._ids is None else self.encoder.encode_ids(self._ids)

    def decode(self) -> object:
        return open_image(self._file)

    def preprocess(self) -> object:
        return preprocess(self._image, self._preprocessing)

    def classify(self) -> object:
        return top_indices(self._scoring.probabilities(self._embedding, self._labels)[0], _TOP_K)

    def end_to_end(self) -> object:
        """Go from the image file to its top labels, as a device does."""
        embedding = self.encoder.encode_images([open_image(self._file)])
        return top_indices(self._scoring.probabilities(embedding, self._labels)[0], _TOP_K)


RESAMPLES = 1_000
_PERCENTILES = (50, 95, 99)


class Percentiles(msgspec.Struct, frozen=True):
    """Latency percentiles of repeated calls, in milliseconds.

    Attributes:
        p50_interval, p95_interval, p99_interval: 95 % intervals, by bootstrap over timing blocks and over the calls in
            each of them.
        blocks: the p50 of each timing block, in chronological order.
    """

    p50: float
    p95: float
    p99: float
    p50_interval: Interval
    p95_interval: Interval
    p99_interval: Interval
    blocks: tuple[float, ...]


def percentiles(blocks: Sequence[Milliseconds]) -> Percentiles:
    """Compute the percentiles of the latencies in B timing blocks.

    Calls of one block resemble each other more than calls of different blocks. The bootstrap therefore resamples
    blocks first and then calls within them; resampling calls alone would give intervals that are too narrow.
    """
    p50, p95, p99 = (float(value) for value in np.percentile(np.concatenate(blocks), _PERCENTILES))
    resamples = _resample(blocks, np.random.default_rng(0))
    percentile = np.nanpercentile if np.isnan(resamples).any() else np.percentile  # the latter is several times as fast
    lows, highs = np.percentile(percentile(resamples, _PERCENTILES, axis=1), [2.5, 97.5], axis=1)
    at50, at95, at99 = (Interval(float(low), float(high)) for low, high in zip(lows, highs, strict=True))
    return Percentiles(p50, p95, p99, at50, at95, at99, medians(blocks))


def medians(blocks: Sequence[Milliseconds]) -> tuple[float, ...]:
    """Return the p50 of each block."""
    return tuple(float(np.median(block)) for block in blocks)


def _resample(blocks: Sequence[Milliseconds], rng: np.random.Generator) -> Milliseconds:
    """Draw bootstrap samples, (RESAMPLES, B × calls of the longest block), NaN after the calls of shorter ones."""
    lengths = np.asarray([len(block) for block in blocks])
    table = np.full((len(blocks), lengths.max()), np.nan)
    for row, block in zip(table, blocks, strict=True):
        row[: len(block)] = block
    shape = (RESAMPLES, *table.shape)
    block_indices = rng.integers(0, len(blocks), shape[:2])[:, :, None]
    drawn_lengths = lengths[block_indices]
    resamples = table[block_indices, rng.integers(0, drawn_lengths, shape)]
    return np.where(np.arange(lengths.max()) < drawn_lengths, resamples, np.nan).reshape(RESAMPLES, -1)


REFERENCE = "\0reference"  # cannot be the label of a row
# The reference workload, y = MatMul(x, w), built with onnx.helper (opset 17, IR version 8). It is embedded because
# devices do not have the `onnx` package.
REFERENCE_MODEL = base64.b64decode(
    "CAgSADpjChEKAXgKAXcSAXkiBk1hdE11bBIJcmVmZXJlbmNlWhUKAXgSEAoOCAESCgoDEgFOCgMSAUtaFQoBdxIQCg4IARIKCgMSAUsKAxIBTWIV"
    "CgF5EhAKDggBEgoKAxIBTgoDEgFNQgQKABAR"
)
# 134 million operations on 4.8 MB: one or two milliseconds on a server core, and larger than the core's own cache.
REFERENCE_SHAPES = {"x": (64, 512), "w": (512, 2048)}


def reference_call(*, threads: int | None) -> Callable[[], object]:
    """Return a call that runs the reference workload on as many threads as the models have."""
    session = open_session(REFERENCE_MODEL, threads=threads)
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in REFERENCE_SHAPES.items()}
    return lambda: session.run(None, feed)


_MEASUREMENTS = ("image", "text", "end_to_end")
BLOCKS = 10
_MIN_ROUNDS = 2  # per block
_MAX_SECONDS = 20.0  # for each of image tower, text tower and end to end
_STEP_ROUNDS, _STEP_SECONDS = 50, 3.0
Calls = dict[str, Callable[[], object]]


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """Latency of the steps before and after the image tower, p50 in milliseconds.

    Attributes:
        decode: image file to pixels.
        preprocess: resize, crop and normalise.
        classify: embedding to the top ones of `labels` labels.
    """

    decode: float
    preprocess: float
    classify: float
    labels: int


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Latency of one encoder at batch 1, in milliseconds.

    Attributes:
        image, text: one tower alone, from pixels or token ids to the embedding; no `text` if the model has no text
            tower.
        end_to_end: image file to label: read, decode, resize, image tower, classify.
        rounds: how often each call was timed.
        threads: number of threads of the encoders; None means all cores.
    """

    image: Percentiles
    text: Percentiles | None
    end_to_end: Percentiles
    rounds: int
    threads: int | None
    steps: Steps


class ReferenceLatency(msgspec.Struct, frozen=True, kw_only=True):
    """The p50 of the reference workload in each timing block of the three measurements, in milliseconds."""

    image: tuple[float, ...]
    text: tuple[float, ...]
    end_to_end: tuple[float, ...]


class Latencies(NamedTuple):
    """Latencies of all encoders of a run, by label, and of the reference workload.

    Attributes:
        other_load: fraction of the machine's CPU time used by other processes meanwhile; None if unknown.
    """

    rows: dict[str, Latency]
    reference: ReferenceLatency
    other_load: float | None


def measure_latencies(
    encoders: Mapping[str, TowerEncoder],
    image: ImageFile,
    *,
    labels: int = 1_000,
    threads: int | None = None,
    rounds: int = 50,
    reporter: Reporter = SILENT,
) -> Latencies:
    """Time all encoders in turn, so that a slow-down of the machine affects all of them alike.

    Image tower, text tower and end to end are timed alternately in BLOCKS blocks. A disturbance of some seconds then
    affects one block of each measurement and shows as a spread between blocks.

    Args:
        encoders: the encoders, by label.
        image: the image file for end-to-end latency; its pixels are the input of the image towers.
        threads: the number of threads that the encoders were opened with; it is recorded, not set.
        rounds: max number of times each call is timed.
    """
    encoder_calls = {label: EncoderCalls(encoder, image, labels) for label, encoder in encoders.items()}
    workload = reference_call(threads=threads)
    measurements: list[Calls] = [{REFERENCE: workload} for _ in _MEASUREMENTS]
    for label, timed in encoder_calls.items():
        measurements[0][label], measurements[2][label] = timed.embed_image, timed.end_to_end
        if embeds_texts(timed.encoder):
            measurements[1][label] = timed.embed_text
    for call in (call for calls in measurements for call in calls.values()):
        warm_up(call)
    load = BackgroundLoad()
    block_sizes = [len(block) for block in np.array_split(np.arange(rounds), min(BLOCKS, rounds))]
    samples: list[dict[str, list[Milliseconds]]] = [{label: [] for label in calls} for calls in measurements]
    for number, size in enumerate(block_sizes):
        reporter.update("Latency", number, len(block_sizes))
        for calls, blocks in zip(measurements, samples, strict=True):
            seconds = _MAX_SECONDS / len(block_sizes)
            times = time_in_turn(calls, rounds=size, warmup=1, max_seconds=seconds, min_rounds=_MIN_ROUNDS)
            for label, block in times.items():
                blocks[label].append(block)
    reporter.update("Latency", len(block_sizes), len(block_sizes))
    steps = _measure_steps(encoder_calls, labels, rounds=min(rounds, _STEP_ROUNDS))
    rows = {
        label: _latency([blocks.get(label) for blocks in samples], steps[label], threads=threads) for label in encoders
    }
    reference_medians = (medians(blocks[REFERENCE]) for blocks in samples)
    reference = ReferenceLatency(**dict(zip(_MEASUREMENTS, reference_medians, strict=True)))
    return Latencies(rows, reference, load.share())


def _measure_steps(encoder_calls: Mapping[str, EncoderCalls], labels: int, *, rounds: int) -> dict[str, Steps]:
    times = {}
    for step in ("decode", "preprocess", "classify"):
        calls: Calls = {label: getattr(calls, step) for label, calls in encoder_calls.items()}
        times[step] = time_in_turn(calls, rounds=rounds, max_seconds=_STEP_SECONDS)
    return {
        label: Steps(labels=labels, **{step: float(np.median(found[label])) for step, found in times.items()})
        for label in encoder_calls
    }


def _latency(measurements: Sequence[list[Milliseconds] | None], steps: Steps, *, threads: int | None) -> Latency:
    image, text, end_to_end = (percentiles(blocks) if blocks else None for blocks in measurements)
    assert image is not None
    assert end_to_end is not None
    rounds = min(sum(map(len, blocks)) for blocks in measurements if blocks)
    return Latency(image=image, text=text, end_to_end=end_to_end, rounds=rounds, threads=threads, steps=steps)


BATCHES = (8, 32)  # batch 1 is the latency
_THROUGHPUT_ROUNDS, _MIN_THROUGHPUT, _THROUGHPUT_SECONDS = 7, 3, 10.0
Pixels = npt.NDArray[np.float32]


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Images per second in an image tower at this batch size; the median of several calls."""

    batch: int
    images_per_second: float


def measure_throughput(
    encoders: Mapping[str, TowerEncoder], pixels: Mapping[str, Pixels]
) -> dict[str, tuple[Throughput, ...]]:
    """Time all image towers in turn at each of BATCHES, with one preprocessed image per encoder, (1, 3, H, W)."""
    results: dict[str, list[Throughput]] = {label: [] for label in encoders}
    for batch in BATCHES:
        calls: dict[str, Callable[[], object]] = {
            label: partial(encoder.encode_pixels, np.repeat(pixels[label], batch, axis=0))
            for label, encoder in encoders.items()
        }
        times = time_in_turn(
            calls, rounds=_THROUGHPUT_ROUNDS, warmup=1, max_seconds=_THROUGHPUT_SECONDS, min_rounds=_MIN_THROUGHPUT
        )
        for label, samples in times.items():
            rate = 1000 * batch / float(np.median(samples))
            results[label].append(Throughput(batch=batch, images_per_second=rate))
    return {label: tuple(by_batch) for label, by_batch in results.items()}


# Takes a model's name, runtime and number of threads. Returns the command of a process that opens the model, embeds a
# text and the image whose path is appended to the command, and prints one line of JSON with `peak_memory_bytes`.
Launch = Callable[[str, Any, int], Sequence[str]]
_MAX_RUNS, _MAX_RUN_SECONDS, _MAX_ANSWER_SECONDS = 3, 4.0, 600.0


class ColdStart(msgspec.Struct, frozen=True, kw_only=True):
    """Cold start of a new process, with its files already in the operating system's cache.

    Attributes:
        first_answer_s: time from launch to the embeddings of an image and a text, including imports and loading; the
            median of `runs`.
        peak_memory_bytes: peak memory of the process; None if unknown.
    """

    first_answer_s: float
    runs: int
    peak_memory_bytes: int | None


def measure_cold_start(command: Sequence[str], image: ImageFile) -> ColdStart | None:
    """Run a command up to three times, for about four seconds in total; return None if it fails or hangs."""
    seconds: list[float] = []
    peaks: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"  # copied, because the image may be a member of a tar
        path.write_bytes(image.read_bytes())
        while len(seconds) < _MAX_RUNS and sum(seconds) < _MAX_RUN_SECONDS:
            answer = _time_first_answer([*command, str(path)])
            if answer is None:
                return None
            duration, peak = answer
            seconds.append(duration)
            peaks += [peak] if peak is not None else []
    median = float(np.median(seconds))
    return ColdStart(first_answer_s=median, runs=len(seconds), peak_memory_bytes=max(peaks, default=None))


def _time_first_answer(command: Sequence[str]) -> tuple[float, int | None] | None:
    """Return the seconds until a process prints its line, which is before it exits, and its peak memory."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    limit = threading.Timer(_MAX_ANSWER_SECONDS, process.kill)  # of a process that hangs, as in a driver
    limit.start()
    try:
        with process:
            assert process.stdout is not None
            line = process.stdout.readline()
            duration = time.perf_counter() - start
    finally:
        limit.cancel()
    try:
        return duration, msgspec.json.decode(line, type=_FirstAnswer).peak_memory_bytes
    except msgspec.DecodeError:
        return None


class _FirstAnswer(msgspec.Struct):
    peak_memory_bytes: int | None
