"""The images and captions that INT8 and the answers are calibrated on, and held-out ones to evaluate INT8.

A run keeps its own in RUN/calibration.npz, beside the student: data that its record names are never opened, since the
record may be a stranger's.

    images   (N, H, W, 3) uint8, of the size of the student's input; each value less the one on its left, modulo 256,
             which compresses better
    record   (…,) uint8, JSON: the name of the data, the N captions, and whether each belongs to its image
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_rd_edge.benchmarking.metrics import calibration_error, separation
from clip_rd_edge.bundle.encoder import Calibration, Embeddings, Matches, Scoring
from clip_rd_edge.bundle.image_files import list_images
from clip_rd_edge.bundle.preprocess import Pixels, Preprocessing, fit, preprocess
from clip_rd_edge.bundle.runs import CALIBRATION_FILE, model_folder, read_training_record, refuse_unfinished_run
from clip_rd_edge.bundle.tokenizer import TokenIds
from clip_rd_edge.data.folders import image_samples, subfolders
from clip_rd_edge.data.load import Mixed, load_pairs, names_shards
from clip_rd_edge.data.samples import MAX_BAD_SHARE, BadSamples
from clip_rd_edge.data.samples import Samples as DataSamples
from clip_rd_edge.data.tables import MissingColumnError
from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.runtime.labels import everyday_labels
from clip_rd_edge.utils.arrays import npz_bytes, read_npz
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.paths import Typed, is_file, is_folder

# Activation ranges hardly change beyond about a hundred images; with 192 held-out images, one is half a point of
# accuracy.
MAX_CALIBRATION, MAX_HELD_OUT = 128, 192
MIN_PAIRS = 32
# So that a table of one image alone is not read to its end; five captions per image are usual.
_MAX_READ = 8 * (MAX_CALIBRATION + MAX_HELD_OUT)
_MAX_BYTES = 1 << 30  # of the images that a run keeps: as many as there are, of 1,024 pixels


class Samples(NamedTuple):
    """Model inputs of N pairs: pixels (N, 3, H, W) float32 and token ids (N, T) int64."""

    pixels: Pixels
    ids: TokenIds


@dataclass(frozen=True)
class CalibrationSet:
    """Samples that set activation ranges, and held-out ones that candidates are evaluated on.

    Attributes:
        paired: whether each caption belongs to its image, so that right answers are known.
        seen: whether the model was trained on them, whose matches are better than those of other pairs.
        unseen: others, on which the answers are calibrated instead.
    """

    name: str
    calibrate: Samples
    held_out: Samples
    paired: bool = True
    seen: bool = False
    unseen: CalibrationSet | None = None

    @property
    def for_answers(self) -> CalibrationSet:
        """The samples whose first part calibrates the answers: the second has chosen how INT8 is done."""
        if self.unseen is None:
            return self
        halves = (self.unseen.calibrate, self.unseen.held_out)
        pixels = np.concatenate([half.pixels for half in halves])[:MAX_CALIBRATION]
        ids = np.concatenate([half.ids for half in halves])[:MAX_CALIBRATION]
        return replace(self.unseen, calibrate=Samples(pixels, ids))


@dataclass(frozen=True)
class CalibrationPairs:
    """N pairs that were chosen for INT8: first those to calibrate on, then those to evaluate with.

    Attributes:
        images: (N, H, W, 3) uint8, of the size of the model's input.
    """

    name: str
    images: npt.NDArray[np.uint8]
    captions: list[str]
    paired: bool
    seen: bool = False

    def for_model(
        self, *, preprocessing: Preprocessing, tokenize: Callable[[Sequence[str]], TokenIds]
    ) -> CalibrationSet:
        """Return the inputs of a model: half for calibration and half held out, at most 128 and 192."""
        pixels: Pixels = np.stack([preprocess(Image.fromarray(image), preprocessing) for image in self.images])
        ids, half = tokenize(self.captions), min(MAX_CALIBRATION, len(pixels) // 2)
        calibrate, held_out = (Samples(pixels[part], ids[part]) for part in (slice(half), slice(half, None)))
        return CalibrationSet(self.name, calibrate, held_out, self.paired, self.seen)


def choose_pairs(
    pairs: DataSamples, *, preprocessing: Preprocessing, seed: int = 0, max_bad: float = MAX_BAD_SHARE
) -> CalibrationPairs:
    """Sample pairs without replacement, at most 320; pairs alone, if there are enough of them among other samples.

    Of pairs with the same image, such as the rows of one image's captions, one is taken: another one among the held-out
    pairs would be evaluated on what set the ranges. Others stand in for pairs that cannot be read, as long as these are
    no larger a share than `max_bad`.
    """
    counts = pairs.counts
    paired = not counts.is_mixed or counts.pairs >= MIN_PAIRS
    count = counts.pairs if paired else len(pairs)
    generator = random.Random(seed)
    wanted = min(count, MAX_CALIBRATION + MAX_HELD_OUT)
    drawn = generator.sample(range(count), wanted)
    # Drawn apart, so that pairs of different images give the set that they always gave.
    spare = random.Random(seed).sample(range(count), min(count, _MAX_READ))
    bad = BadSamples(pairs, max_share=max_bad)
    captions: list[str] = []
    images: dict[bytes, npt.NDArray[np.uint8]] = {}
    for index in dict.fromkeys([*drawn, *spare]):
        if len(images) == wanted:
            break
        try:
            sample = pairs.read(index)
            image, texts = np.asarray(fit(sample.image(), preprocessing)), sample.captions
        except InputError as error:
            bad.add([(index, str(error))])
            continue
        if images.setdefault(hashlib.sha256(image.tobytes()).digest(), image) is image:
            captions.append(texts[0] if counts.classes else generator.choice(texts))  # one prompt for all
    if len(images) < MIN_PAIRS:
        raise InputError(
            f"{pairs.name} has {len(images)} different {'pairs' if paired else 'images'} that can be read; at least "
            f"{MIN_PAIRS} are needed to calibrate and evaluate INT8.",
            hint="pass more pairs with {calibration}, or use {precision} fp32",
        )
    return CalibrationPairs(pairs.name, np.stack(list(images.values())), captions, paired)


def calibration_set(
    pairs: DataSamples | CalibrationPairs,
    *,
    preprocessing: Preprocessing,
    tokenize: Callable[[Sequence[str]], TokenIds],
    seed: int = 0,
    seen: bool = False,
) -> CalibrationSet:
    """Choose pairs for a model, unless they are chosen; arguments as for `choose_pairs` and `CalibrationPairs`."""
    if not isinstance(pairs, CalibrationPairs):
        pairs = replace(choose_pairs(pairs, preprocessing=preprocessing, seed=seed), seen=seen)
    return pairs.for_model(preprocessing=preprocessing, tokenize=tokenize)


class _Record(msgspec.Struct, frozen=True):
    name: str
    captions: list[str]
    paired: bool


def keep_pairs(run: Path, chosen: CalibrationPairs) -> None:
    """Write RUN/calibration.npz."""
    differences = np.diff(chosen.images, axis=2, prepend=np.uint8(0))
    record = msgspec.json.encode(_Record(chosen.name, chosen.captions, chosen.paired))
    content = npz_bytes(compressed=True, images=differences, record=np.frombuffer(record, np.uint8))
    write_bytes(run / CALIBRATION_FILE, content)


def kept_pairs(model: str) -> CalibrationPairs:
    """Read what the run of a model has kept beside the model's folder."""
    refuse_unfinished_run(model)
    folder = model_folder(model)
    path = folder.parent / CALIBRATION_FILE if folder else None
    arrays = read_npz(path, max_bytes=_MAX_BYTES, hint=_HINT) if path is not None and is_file(path) else {}
    images, record = arrays.get("images", np.empty(0)), arrays.get("record", np.empty(0))
    try:
        content = msgspec.json.decode(record.tobytes(), type=_Record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        content = _Record("", [], True)
    is_rgb = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3 and images.size > 0
    if not is_rgb or len(images) != len(content.captions):
        raise ConfigError(
            f"INT8 needs calibration pairs, and {model} has none, or no valid ones: a run keeps its own in "
            f"{CALIBRATION_FILE}, beside the model.",
            hint=_HINT,
        )
    levels = np.cumsum(images, axis=2, dtype=np.uint8)
    return CalibrationPairs(content.name, levels, content.captions, content.paired, seen=True)


_HINT = "pass inputs like those the model will see in use: {calibration} pairs.csv, or {calibration} photos/"


def _configuration(model: str) -> dict[str, Any]:
    recorded = read_training_record(model).get("configuration")
    return recorded if isinstance(recorded, dict) else {}


def was_trained_on(model: str, source: Typed) -> bool:
    """Return whether a model was, by its record, trained on the data that the user names."""
    data = _configuration(model).get("data")
    return isinstance(data, str) and (data == source or Path(data).absolute() == Path(source).absolute())


def named_pairs(
    source: Typed, model: str, *, texts: Sequence[str] | None = None, labels: Sequence[str] | None = None
) -> DataSamples:
    """Load the pairs that the user names.

    A table may have the columns of any table of pairs, or else those of the one that `model` was trained on. A folder
    with fewer than two class folders, or any folder beside `texts`, holds only images: the captions are `texts`, else
    `labels`, else everyday things.
    """
    if is_folder(source) and not names_shards(source):
        folder = Path(source)
        if texts is not None or sum(any(list_images(inner)) for inner in subfolders(folder)) < 2:
            return Mixed(None, image_samples(source, folder), tuple(texts or labels or everyday_labels()))
    with contextlib.suppress(MissingColumnError):
        return load_pairs(source)
    columns = _configuration(model)
    image_key, caption_key = columns.get("csv_img_key", "filepath"), columns.get("csv_caption_key", "title")
    return load_pairs(source, image_key=str(image_key), caption_key=str(caption_key))


Hits = npt.NDArray[np.bool_]
MIN_SEPARATION = 0.6  # of own captions from others, as an area under the ROC curve; 0.5 is chance
LIST_SIZES = (5, 20, 100)  # labels in the lists that the temperature is fitted on, each with the right one
PRIOR = 0.05  # share of labels that fit an image, for a label's own probability
_LISTS = 20  # per pair and size
_DIGITS = 4  # of what is stored


def calibrate(
    images: Embeddings, captions: Embeddings, background: Embeddings, scoring: Scoring, *, source: str
) -> Calibration | None:
    """Return what N pairs show, from their embeddings, (N, D) each; None if the captions do not fit their images.

    Args:
        background: embeddings of common nouns, (K, D).
    """
    # Equal captions, such as the prompts of a class, are no wrong answers to each other.
    others = ~(captions @ captions.T > 1 - 1e-5)
    found = scoring.matches(images, captions, background)
    own, wrong = found.diagonal(), found[others]
    if len(images) < MIN_PAIRS or wrong.size == 0 or separation(own, wrong) < MIN_SEPARATION:
        return None
    slope, intercept = fit_sigmoid(own, wrong)
    lists = _label_lists(scoring.scale * (images @ captions.T), others)
    temperature = 1.0 if scoring.is_independent else fit_temperature(lists)
    before, after = (expected_error(lists, value) for value in (1.0, temperature))
    return Calibration(
        temperature=round(temperature, _DIGITS),
        slope=round(slope, _DIGITS),
        intercept=round(intercept, _DIGITS),
        curve=tuple(round(float(match), _DIGITS) for match in own),
        source=source,
        error=0.0 if scoring.is_independent else round(after, _DIGITS),
        error_before=0.0 if scoring.is_independent else round(before, _DIGITS),
    )


def fit_sigmoid(own: Matches, wrong: Matches) -> tuple[float, float]:
    """Return slope and intercept of a logistic regression on matches (Platt 1999), at the PRIOR of a label that fits.

    Newton's method, weighted so that own captions make up the prior; the targets are Platt's, so that pairs without a
    wrong order give no infinite slope.
    """
    values = np.concatenate([own, wrong]).astype(np.float64)
    weights = np.concatenate([np.full(len(own), PRIOR / len(own)), np.full(len(wrong), (1 - PRIOR) / len(wrong))])
    targets = np.concatenate([np.full(len(own), 1 - 1 / (len(own) + 2)), np.full(len(wrong), 1 / (len(wrong) + 2))])
    inputs = np.stack([values, np.ones_like(values)], axis=1)
    solution = np.array([0.0, np.log(PRIOR / (1 - PRIOR))])

    def loss(candidate: npt.NDArray[np.float64]) -> float:
        logits = inputs @ candidate
        return float(weights @ (np.logaddexp(0, logits) - targets * logits))

    for _ in range(100):
        fitted = 1 / (1 + np.exp(-np.clip(inputs @ solution, -30, 30)))
        hessian = (inputs.T * (weights * fitted * (1 - fitted))) @ inputs + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, inputs.T @ (weights * (fitted - targets)))
        while np.abs(step).max() > 1e-6 and loss(solution - step) > loss(solution):
            step /= 2  # far from the solution, Newton's steps overshoot
        solution -= step
        if np.abs(step).max() < 1e-6:
            break
    return float(solution[0]), float(solution[1])


def _label_lists(logits: npt.NDArray[np.floating], others: Hits) -> list[npt.NDArray[np.float64]]:
    """Return logits of lists of labels, the right one first, one array (M, C) per size in LIST_SIZES."""
    rng, lists = np.random.default_rng(0), []
    for size in LIST_SIZES:
        rows = []
        for row, wrong in enumerate(others):
            choices = np.flatnonzero(wrong)
            if len(choices) >= size - 1:
                drawn = [rng.choice(choices, size - 1, replace=False) for _ in range(_LISTS)]
                rows += [logits[row, [row, *chosen]] for chosen in drawn]
        if rows:
            lists.append(np.array(rows, dtype=np.float64))
    return lists or [logits.astype(np.float64)]


def fit_temperature(lists: list[npt.NDArray[np.float64]]) -> float:
    """Return the temperature of the least mean log loss (Guo et al. 2017), each size of list counting the same."""

    def loss(log_temperature: float) -> float:
        scaled = [logits / np.exp(log_temperature) for logits in lists]
        return float(np.mean([np.mean(_log_sum(rows) - rows[:, 0]) for rows in scaled]))

    low, high = np.log(0.05), np.log(20.0)
    golden = (5**0.5 - 1) / 2
    for _ in range(40):  # the loss is convex in the reciprocal, so that it has one minimum
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return float(np.exp((low + high) / 2))


def _log_sum(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    top: npt.NDArray[np.float64] = rows.max(axis=1)
    total: npt.NDArray[np.float64] = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
    return total


def expected_error(lists: list[npt.NDArray[np.float64]], temperature: float) -> float:
    """Return the expected calibration error of the first answers, the mean over the sizes of lists."""
    errors = []
    for logits in lists:
        rows = logits / temperature
        confidence = np.exp(rows.max(axis=1) - _log_sum(rows))
        errors.append(calibration_error(confidence, rows.argmax(axis=1) == 0))
    return float(np.mean(errors))
