"""The pictures and captions that INT8 is calibrated on, and others that it is judged by. Never imports torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.checkpoint import DISTILLATION_FILE, model_folder
from clip_rd_edge.contract.preprocess import Pixels, Preprocessing, preprocess
from clip_rd_edge.contract.tokenizer import TokenIds
from clip_rd_edge.data.pairs import BadSamples, Pairs, load_pairs
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.utils.io import read_json

# Ranges of activations hardly move after some hundred pictures; of 192 to judge by, one is half a point of accuracy.
CALIBRATE_ON, JUDGE_BY = 128, 192
LEAST = 32


@dataclass(frozen=True)
class Samples:
    """Model inputs of some pairs: pixels (N, 3, H, W) float32 and token ids (N, T) int64."""

    pixels: Pixels
    ids: TokenIds


@dataclass(frozen=True)
class CalibrationSet:
    """Samples to set ranges by, and samples that no range was set by. `name` is the pairs', for provenance."""

    name: str
    calibrate: Samples
    judge: Samples


def calibration_set(
    pairs: Pairs,
    *,
    preprocessing: Preprocessing,
    tokenize: Callable[[Sequence[str]], TokenIds],
    seed: int = 0,
) -> CalibrationSet:
    """Draw pairs without repetition: half to calibrate on and half to judge by, at most 128 and 192.

    Args:
        pairs: where they are drawn from.
        preprocessing, tokenize: of the model that is quantised.
        seed: of the draw of pairs, and of one caption a pair.

    Raises:
        InputError: fewer than 32 pairs, or too many that cannot be read.
    """
    if len(pairs) < LEAST:
        raise InputError(
            f"{pairs.name} has {len(pairs)} pairs; at least {LEAST} are needed to calibrate INT8 and to judge it.",
            hint="give more pairs with --calibration, or choose --precision fp32",
        )
    generator = random.Random(seed)
    drawn = generator.sample(range(len(pairs)), min(len(pairs), CALIBRATE_ON + JUDGE_BY))
    bad = BadSamples(pairs)
    captions, pictures = [], []
    for i in drawn:
        pair = bad.take(i)
        captions.append(generator.choice(pair.captions))
        pictures.append(preprocess(pair.image, preprocessing))
    pixels: npt.NDArray[np.float32] = np.stack(pictures)
    ids = tokenize(captions)
    cut = min(CALIBRATE_ON, len(drawn) // 2)
    return CalibrationSet(
        pairs.name, calibrate=Samples(pixels[:cut], ids[:cut]), judge=Samples(pixels[cut:], ids[cut:])
    )


_HINT = "name pairs like those the model will meet: --calibration pairs.csv, or --calibration emoji"


def calibration_pairs(source: str | None, model: str) -> Pairs:
    """The pairs `source` names, else those that the distillation.json in `model`'s folder names.

    Raises:
        UsageError: neither names any, or those of distillation.json are not here.
        InputError: `source` cannot be loaded.
    """
    if source is not None:
        return load_pairs(source)
    folder = model_folder(model)
    record = folder / DISTILLATION_FILE if folder else None
    if record is None or not record.is_file():
        raise UsageError(
            f"INT8 needs pairs to calibrate on, and {model} does not say what it was trained with.", hint=_HINT
        )
    trained = read_json(record, _Trained)
    if trained.data is None:
        raise UsageError(f"INT8 needs pairs to calibrate on, and {record} names no data.", hint=_HINT)
    keys = trained.configuration
    try:
        return load_pairs(
            trained.data, image_key=keys.csv_img_key, caption_key=keys.csv_caption_key, json_key=keys.json_caption_key
        )
    except InputError as error:
        raise UsageError(
            f"INT8 needs pairs to calibrate on, and those that the model was trained with cannot be loaded: {error}",
            hint=_HINT,
        ) from error


class _Columns(msgspec.Struct):
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    json_caption_key: str | None = None


class _Trained(msgspec.Struct):
    """What is read of distillation.json."""

    data: str | None = None
    configuration: _Columns = msgspec.field(default_factory=_Columns)
