"""An INT8 bundle from a float32 one. Never imports torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from clip_rd_edge.contract.bundle import Manifest, Tower
from clip_rd_edge.contract.files import write_bytes
from clip_rd_edge.exporters.backends import ORT, Backend
from clip_rd_edge.exporters.calibration import CalibrationSet
from clip_rd_edge.exporters.choose import Trial
from clip_rd_edge.exporters.quantize import QuantizedTower, quantize_tower
from clip_rd_edge.exporters.source import open_source


def write_int8(
    source: Path,
    folder: Path,
    *,
    calibration: CalibrationSet,
    threads: int,
    progress: Callable[[str], None],
    on_trials: Callable[[Sequence[Trial]], None],
    backend: Backend = ORT,
) -> Manifest:
    """Write the towers of the float32 bundle `source` in INT8 into `folder`; return their manifest, not yet written.

    A tower that INT8 makes no faster, or too inaccurate, stays float32, and its note says so.

    Args:
        on_trials: given the table of what was tried, once a tower.
        backend: the runtime that they are for, and measured in.

    Raises:
        UsageError: `source` is no float32 bundle, is damaged, or the calibration set was made for another model.
    """
    manifest = open_source(source, folder, calibration=calibration)
    towers = {}
    for name, tower, calibrate, judge in (
        ("image", manifest.image, calibration.calibrate.pixels, calibration.judge.pixels),
        ("text", manifest.text, calibration.calibrate.ids, calibration.judge.ids),
    ):
        quantized = quantize_tower(
            source / tower.file,
            tower=name,
            calibrate=calibrate,
            judge=judge,
            threads=threads,
            progress=progress,
            backend=backend,
        )
        on_trials(quantized.trials)
        towers[name] = _written(quantized, tower, source, folder)
    precisions = dict.fromkeys(tower.precision.split()[0] for tower in towers.values())
    return msgspec.structs.replace(
        manifest,
        precision=" + ".join(precisions),
        target=backend.name,
        image=towers["image"],
        text=towers["text"],
        files={},
    )


def _written(quantized: QuantizedTower, tower: Tower, source: Path, folder: Path) -> Tower:
    if quantized.model is None:
        shutil.copy2(source / tower.file, folder / tower.file)
    else:
        write_bytes(folder / tower.file, quantized.model)
    return msgspec.structs.replace(
        tower, precision=quantized.precision, note=quantized.note, measured=quantized.measured
    )
