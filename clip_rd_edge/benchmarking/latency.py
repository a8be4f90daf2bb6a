"""How long one picture and one text take, of several encoders in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from clip_rd_edge.benchmarking.opened import Opened
from clip_rd_edge.benchmarking.quantiles import Percentiles, medians, percentiles
from clip_rd_edge.benchmarking.reference import NAME as REFERENCE
from clip_rd_edge.benchmarking.reference import reference_call
from clip_rd_edge.contract.encoder import TowerEncoder
from clip_rd_edge.contract.images import ImageFile
from clip_rd_edge.utils.host import OtherLoad
from clip_rd_edge.utils.timing import Milliseconds, time_in_turn, warm_up

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
    progress: Callable[[int, int], None] = lambda done, total: None,
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
        progress: told of sittings done and sittings in all.

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
        progress(sitting, len(sizes))
        for calls, found in zip(kinds, timed, strict=True):
            seconds = max_seconds / len(sizes)
            times = time_in_turn(calls, rounds=size, warmup=1, max_seconds=seconds, least=_LEAST_ROUNDS)
            for name, samples in times.items():
                found[name].append(samples)
    progress(len(sizes), len(sizes))
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
        images[label], texts[label], whole[label] = each.embed_picture, each.embed_text, each.answer
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
