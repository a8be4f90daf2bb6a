"""Files of a student checkpoint: a folder that open_clip loads as `local-dir:PATH`.

    open_clip_config.json         `model_cfg` and `preprocess_cfg`
    open_clip_model.safetensors   the weights
    distillation.json             recipe, teacher, data, seed, versions, templates, labels
    config.json, tokenizer.json   of a text tower that is a model of transformers; the latter of any own tokenizer

In the folder of a run it is `student/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.paths import is_file
from clip_rd_edge.utils.structs import read_json

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
DISTILLATION_FILE = "distillation.json"
TRANSFORMERS_CONFIG = "config.json"
STUDENT_FOLDER = "student"
LOCAL_DIR = "local-dir:"
# What DISTILLATION_FILE says of one model, and not of others that are made from its weights.
_OF_ONE_MODEL = ("evaluation", "templates", "average", "date")


def model_folder(spec: str) -> Path | None:
    """Return the model folder for `spec`: the folder itself, or `student/` in a run; None if `spec` is not a folder."""
    if not spec:
        return None  # and not the working folder
    path = Path(spec.removeprefix(LOCAL_DIR))
    for candidate in (path, path / STUDENT_FOLDER):
        if is_file(candidate / CONFIG_FILE):
            return candidate
    return path if spec.startswith(LOCAL_DIR) else None


def refuse_unfinished_run(spec: str) -> None:
    """Refuse the folder of a run that has no student yet."""
    run = Path(spec)
    if spec and is_file(run / RUN_CONFIG_FILE) and model_folder(spec) is None:
        raise InputError(
            f"The run {spec} has no student yet: it was interrupted, or it is still training.",
            hint="finish it with its own command and --resume: clip-rd-edge distill --help",
        )


def training_record_path(folder: Path | None) -> Path | None:
    """Return the record of training in a model's folder, if there is one."""
    path = folder / DISTILLATION_FILE if folder else None
    return path if path and is_file(path) else None


def read_training_record(spec: str) -> dict[str, Any]:
    """Return what is recorded of a model's training, such as the data for calibration; empty without a record."""
    path = training_record_path(model_folder(spec))
    record = read_json(path, Any) if path else None
    return {k: v for k, v in record.items() if k not in _OF_ONE_MODEL} if isinstance(record, dict) else {}


def was_quantized_in_training(spec: str) -> bool:
    """Return whether a model has weights that were trained under INT8's rounding, by `distill --quantize int8`."""
    configuration = read_training_record(spec).get("configuration")
    if not isinstance(configuration, dict) or configuration.get("tuned_share") == 0:  # of which it has none
        return False
    return configuration.get("quantize") == "int8"


RUN_CONFIG_FILE = "config.yaml"
INPUTS_FILE = "inputs.json"
DATA_FOLDER = "data"  # of a run that holds a part of its data back
METRICS_FILE = "metrics.jsonl"
REPORT_FOLDER = "report"
PREDICTIONS_FILE = "predictions.png"  # in the report
CALIBRATION_FILE = "calibration.npz"
EVALUATION_PREFIX = "evaluation/"  # of a task's score in a line of metrics.jsonl
TERM_PREFIX = "loss/"  # of a loss term


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return all lines of a run's metrics.jsonl, without a truncated last line."""
    path = run / METRICS_FILE
    lines = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            lines.append(msgspec.json.decode(line))
        except msgspec.DecodeError:
            break
    return lines
