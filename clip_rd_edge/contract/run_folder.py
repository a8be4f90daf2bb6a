"""Files of a run's folder that are read without PyTorch.

    config.yaml     the resolved configuration
    inputs.json     the number of pairs, and fingerprints of data and teacher
    metrics.jsonl   one line per logged step
    calibration.npz images and captions of the data, for INT8

The other files are described in `distillation.run`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

RUN_CONFIG_FILE = "config.yaml"
INPUTS_FILE = "inputs.json"
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
