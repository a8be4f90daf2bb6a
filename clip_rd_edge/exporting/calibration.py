"""The images and captions that INT8 and the answers are calibrated on, and held-out ones to evaluate INT8.

A run keeps its own in RUN/calibration.npz, beside the student: what its record says of the data is never opened, since
it may be a stranger's.

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
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_rd_edge.bundle.image_files import list_images
from clip_rd_edge.bundle.preprocess import Pixels, Preprocessing, fit, preprocess
from clip_rd_edge.bundle.runs import CALIBRATION_FILE, model_folder, read_training_record, refuse_unfinished_run
from clip_rd_edge.bundle.tokenizer import TokenIds
from clip_rd_edge.data.folders import image_samples, subfolders
from clip_rd_edge.data.load import Mixed, load_pairs, names_shards
from clip_rd_edge.data.samples import MAX_BAD_SHARE, BadSamples
from clip_rd_edge.data.samples import Samples as DataSamples
from clip_rd_edge.data.tables import MissingColumnError
from clip_rd_edge.errors import ConfigError, InputError, UsageError
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
        name: the name of the pairs, for provenance.
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
        """The samples whose first part answers are calibrated on: the second has chosen how INT8 is done."""
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
        name: of the data that they are from.
        images: (N, H, W, 3) uint8, of the size of the model's input.
        captions: one of each image.
        paired: whether each caption belongs to its image.
        seen: whether the model was trained on them.
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
        if self.images.shape[1:3] != preprocessing.size:
            size, other = (" × ".join(map(str, shape)) for shape in (preprocessing.size, self.images.shape[1:3]))
            raise UsageError(f"The model takes images of {size} pixels, and those of its run have {other}.", hint=_HINT)
        pixels: Pixels = np.stack([preprocess(Image.fromarray(image), preprocessing) for image in self.images])
        ids, half = tokenize(self.captions), min(MAX_CALIBRATION, len(pixels) // 2)
        calibrate, held_out = (Samples(pixels[part], ids[part]) for part in (slice(half), slice(half, None)))
        return CalibrationSet(self.name, calibrate, held_out, self.paired, self.seen)


def choose_pairs(
    pairs: DataSamples, *, preprocessing: Preprocessing, seed: int = 0, max_bad: float = MAX_BAD_SHARE
) -> CalibrationPairs:
    """Sample pairs without replacement, at most 320.

    Of pairs with the same image, such as the rows of one image's captions, one is taken: another one among the held-out
    pairs would be evaluated on what set the ranges. Others stand in for pairs that cannot be read.

    Args:
        pairs: where the samples come from; pairs alone, if there are enough of them among other images and captions.
        seed: for choosing the pairs, and one caption per pair.
        max_bad: max fraction of the samples that may be unreadable.
    """
    counts = pairs.counts
    paired = not counts.is_mixed or counts.pairs >= MIN_PAIRS
    count = counts.pairs if paired else len(pairs)
    _require_enough(pairs, count, "pairs" if paired else "images")
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
    _require_enough(pairs, len(images), "readable pairs of different images" if paired else "different readable images")
    return CalibrationPairs(pairs.name, np.stack(list(images.values())), captions, paired)


def _require_enough(pairs: DataSamples, count: int, what: str) -> None:
    if count < MIN_PAIRS:
        raise InputError(
            f"{pairs.name} has {count} {what}; at least {MIN_PAIRS} are needed to calibrate and evaluate INT8.",
            hint="pass more pairs with {calibration}, or use {precision} fp32",
        )


def calibration_set(
    pairs: DataSamples,
    *,
    preprocessing: Preprocessing,
    tokenize: Callable[[Sequence[str]], TokenIds],
    seed: int = 0,
    seen: bool = False,
) -> CalibrationSet:
    """Choose pairs for a model; arguments as for `choose_pairs` and `CalibrationPairs`."""
    chosen = replace(choose_pairs(pairs, preprocessing=preprocessing, seed=seed), seen=seen)
    return chosen.for_model(preprocessing=preprocessing, tokenize=tokenize)


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
    if path is None or not is_file(path):
        raise UsageError(
            f"INT8 needs calibration pairs, and {model} comes without: a run keeps its own in {CALIBRATION_FILE}, "
            "beside the model.",
            hint=_HINT,
        )
    arrays = read_npz(path, max_bytes=_MAX_BYTES, hint=_HINT)
    images, record = arrays.get("images", np.empty(0)), arrays.get("record", np.empty(0))
    try:
        content = msgspec.json.decode(record.tobytes(), type=_Record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        content = _Record("", [], True)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(content.captions):
        raise ConfigError(f"{path} has no valid images, or no valid record of their captions.", hint=_HINT)
    levels = np.cumsum(images, axis=2, dtype=np.uint8)
    return CalibrationPairs(content.name, levels, content.captions, content.paired, seen=True)


_HINT = "pass inputs like those the model will see in use: {calibration} pairs.csv, or {calibration} photos/"


def was_trained_on(model: str, source: Typed) -> bool:
    """Return whether a model's record says that it was trained on the data that the user names."""
    recorded = read_training_record(model).get("configuration")
    data = recorded.get("data") if isinstance(recorded, dict) else None
    return isinstance(data, str) and (data == source or Path(data).absolute() == Path(source).absolute())


def named_pairs(
    source: Typed, model: str, *, texts: Sequence[str] | None = None, labels: Sequence[str] | None = None
) -> DataSamples:
    """Load the pairs that the user names.

    A table may have the columns of any table of pairs, or else those of the one that `model` was trained on. A folder
    with fewer than two class folders, or any beside `texts`, holds images alone: the captions are `texts`, else
    `labels`, else everyday things.
    """
    if is_folder(source) and not names_shards(source):
        folder = Path(source)
        if texts is not None or sum(any(list_images(inner)) for inner in subfolders(folder)) < 2:
            return Mixed(None, image_samples(source, folder), tuple(texts or labels or everyday_labels()))
    with contextlib.suppress(MissingColumnError):
        return load_pairs(source)
    recorded = read_training_record(model).get("configuration")
    columns = recorded if isinstance(recorded, dict) else {}
    image_key, caption_key = columns.get("csv_img_key", "filepath"), columns.get("csv_caption_key", "title")
    return load_pairs(source, image_key=str(image_key), caption_key=str(caption_key))
