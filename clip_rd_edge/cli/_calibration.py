"""The pairs that INT8 is calibrated on: named by the user, or those that the model was trained with."""

from __future__ import annotations

import msgspec

from clip_rd_edge.contract.checkpoint import DISTILLATION_FILE, model_folder
from clip_rd_edge.data.pairs import Pairs, load_pairs
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.utils.io import read_json

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
        return load_pairs(trained.data, image_key=keys.image_key, caption_key=keys.caption_key, json_key=keys.json_key)
    except InputError as error:
        raise UsageError(
            f"INT8 needs pairs to calibrate on, and those that the model was trained with cannot be loaded: {error}",
            hint=_HINT,
        ) from error


class _Columns(msgspec.Struct):
    image_key: str = "filepath"
    caption_key: str = "title"
    json_key: str | None = None


class _Trained(msgspec.Struct):
    """What is read of distillation.json."""

    data: str | None = None
    configuration: _Columns = msgspec.field(default_factory=_Columns)
