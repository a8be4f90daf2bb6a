"""The images and captions that INT8 is calibrated on, and held-out ones to evaluate it."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.checkpoint import model_folder, refuse_unfinished_run, training_record_path
from clip_rd_edge.contract.preprocess import Pixels, Preprocessing, preprocess
from clip_rd_edge.contract.run_folder import RUN_CONFIG_FILE
from clip_rd_edge.contract.tokenizer import TokenIds
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.pairs import MAX_BAD_SHARE, BadSamples, Pairs
from clip_rd_edge.data.tables.blocks import MissingColumnError
from clip_rd_edge.data.unpaired import TrainingData, load_samples, pair_count
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.runtime.label_list import read_texts
from clip_rd_edge.utils.paths import is_file
from clip_rd_edge.utils.printable import shown_source
from clip_rd_edge.utils.structs import read_json, read_yaml

# Activation ranges hardly change beyond about a hundred images; with 192 held-out images, one is half a point of
# accuracy.
MAX_CALIBRATION, MAX_HELD_OUT = 128, 192
MIN_PAIRS = 32
# So that a table of one image alone is not read to its end; five captions per image are usual.
_MAX_READ = 8 * (MAX_CALIBRATION + MAX_HELD_OUT)


@dataclass(frozen=True)
class Samples:
    """Model inputs of N pairs: pixels (N, 3, H, W) float32 and token ids (N, T) int64."""

    pixels: Pixels
    ids: TokenIds


@dataclass(frozen=True)
class CalibrationSet:
    """Samples for calibration and held-out samples for evaluation.

    Attributes:
        name: the name of the pairs, for provenance.
        calibrate: samples that set the activation ranges.
        held_out: samples that candidates are evaluated on; none of them sets a range.
        paired: whether each caption belongs to its image, so that right answers are known.
    """

    name: str
    calibrate: Samples
    held_out: Samples
    paired: bool = True


def calibration_set(
    pairs: Pairs,
    *,
    preprocessing: Preprocessing,
    tokenize: Callable[[Sequence[str]], TokenIds],
    seed: int = 0,
    max_bad: float = MAX_BAD_SHARE,
) -> CalibrationSet:
    """Sample pairs without replacement: half for calibration and half held out, at most 128 and 192.

    Of pairs with the same image, such as the rows of one image's captions, one is taken: another one among the held-out
    pairs would be evaluated on what set the ranges. Others stand in for pairs that cannot be read.

    Args:
        pairs: where the samples come from; pairs alone, if there are enough of them among other images and captions.
        preprocessing, tokenize: of the model that is quantised.
        seed: seed for choosing the pairs, and one caption per pair.
        max_bad: max fraction of the samples that may be unreadable.

    Raises:
        InputError: there are fewer than 32 pairs with different images, or too many of them cannot be read.
    """
    paired = len(pairs) == pair_count(pairs) or pair_count(pairs) >= MIN_PAIRS
    count = pair_count(pairs) if paired else len(pairs)
    _require_enough(pairs, count, "pairs" if paired else "images")
    generator = random.Random(seed)
    wanted = min(count, MAX_CALIBRATION + MAX_HELD_OUT)
    drawn = generator.sample(range(count), wanted)
    # Drawn apart, so that pairs of different images give the set that they always gave.
    spare = random.Random(seed).sample(range(count), min(count, _MAX_READ))
    bad = BadSamples(pairs, max_share=max_bad)
    captions: list[str] = []
    images: dict[bytes, Pixels] = {}
    for index in dict.fromkeys([*drawn, *spare]):
        if len(images) == wanted:
            break
        try:
            image, texts = preprocess(pairs.open(index), preprocessing), pairs.captions(index)
        except InputError as error:
            bad.add([(index, str(error))])
            continue
        if images.setdefault(hashlib.sha256(image.tobytes()).digest(), image) is image:
            captions.append(generator.choice(texts))
    _require_enough(pairs, len(images), "readable pairs of different images" if paired else "different readable images")
    pixels: npt.NDArray[np.float32] = np.stack(list(images.values()))
    ids = tokenize(captions)
    half = min(MAX_CALIBRATION, len(images) // 2)
    return CalibrationSet(
        pairs.name,
        calibrate=Samples(pixels[:half], ids[:half]),
        held_out=Samples(pixels[half:], ids[half:]),
        paired=paired,
    )


def _require_enough(pairs: Pairs, count: int, what: str) -> None:
    if count < MIN_PAIRS:
        raise InputError(
            f"{pairs.name} has {count} {what}; at least {MIN_PAIRS} are needed to calibrate and evaluate INT8.",
            hint="pass more pairs with --calibration, or use --precision fp32",
        )


_HINT = "pass pairs like the inputs the model will see in use: --calibration pairs.csv, or --calibration emoji"


def calibration_pairs(source: str | None, model: str) -> Pairs:
    """Load the pairs that `source` names, or else those that distillation.json in `model`'s folder names.

    A table may have the columns of any table of pairs, or else those of the one that the model was trained on.

    Raises:
        UsageError: neither names any pairs, or those of distillation.json are not on this machine.
        InputError: `source` cannot be loaded.
    """
    if source is not None:
        return _named_pairs(source, model)
    path = training_record_path(model_folder(model))
    refuse_unfinished_run(model)
    if path is None:
        raise UsageError(f"INT8 needs calibration pairs, and {model} does not record its training data.", hint=_HINT)
    training = _training_data(path)
    if training.data is None and training.images is None:
        raise UsageError(f"INT8 needs calibration pairs, and {path} names no data.", hint=_HINT)
    try:
        return load_samples(training, read_texts)
    except InputError as error:
        raise UsageError(
            f"INT8 needs calibration pairs, and the model's training pairs cannot be loaded: {error}", hint=_HINT
        ) from error


def _named_pairs(source: str, model: str) -> Pairs:
    with contextlib.suppress(MissingColumnError):
        return load_pairs(source)
    path = training_record_path(model_folder(model))
    training = TrainingData() if path is None else _training_data(path)
    return load_pairs(source, image_key=training.csv_img_key, caption_key=training.csv_caption_key)


def calibration_max_bad(source: str | None, model: str) -> float:
    """Return the max fraction of unreadable samples of `calibration_pairs`: that which `model` was trained with.

    The default, if `source` names other pairs, or the model records none.
    """
    path = training_record_path(model_folder(model)) if source is None else None
    if path is None:
        return MAX_BAD_SHARE
    return read_json(path, _TrainingRecord).configuration.max_bad


def _training_data(path: Path) -> TrainingData:
    """Return what distillation.json says a model was trained on, with the addresses that its run alone keeps."""
    record = read_json(path, _TrainingRecord)
    training = msgspec.structs.replace(record.configuration, data=record.data)
    run_config = path.parent.parent / RUN_CONFIG_FILE
    if not is_file(run_config):
        return training
    addresses = read_yaml(run_config, _Addresses)
    whole = {
        name: address
        for name in _Addresses.__struct_fields__
        if (address := getattr(addresses, name)) is not None and shown_source(address) == getattr(training, name)
    }
    return msgspec.structs.replace(training, **whole)


class _Addresses(msgspec.Struct):
    """The fields of a run's config.yaml that distillation.json has without what may be a secret."""

    data: str | None = None
    images: str | None = None
    texts: str | None = None


class _Configuration(TrainingData, frozen=True, kw_only=True):
    max_bad: float = MAX_BAD_SHARE


class _TrainingRecord(msgspec.Struct):
    """The fields of distillation.json that are read here."""

    data: str | None = None
    configuration: _Configuration = msgspec.field(default_factory=_Configuration)
