"""Convert a float32 bundle for OpenVINO: the same ONNX files, run and measured by OpenVINO."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from clip_rd_edge.bundle.manifest import Manifest, Tower
from clip_rd_edge.exporting.conversion import start_conversion
from clip_rd_edge.exporting.int8.candidates import OPENVINO
from clip_rd_edge.exporting.parity import Inputs, Timer, hard_inputs, measure
from clip_rd_edge.exporting.plan import ExportRequest
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.backends.openvino import open_openvino
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.timing import time_in_turn


def write_openvino(
    source: Path,
    folder: Path,
    request: ExportRequest,
    *,
    reporter: Reporter = SILENT,
    timer: Timer = time_in_turn,
) -> Manifest:
    """Write the float32 bundle `source` for OpenVINO into `folder`; return its manifest, not yet written.

    bf16 is a hint to OpenVINO: it is recorded in the manifest, and the ONNX files stay the same. Latency is measured
    against float32 in ONNX Runtime.
    """
    manifest = start_conversion(source, folder, request)
    inputs = hard_inputs(source, manifest)
    towers = {}
    for name, tower in manifest.towers.items():
        reporter.update(f"{name} tower: comparing OpenVINO with ONNX Runtime")
        shutil.copyfile(source / tower.file, folder / tower.file)
        towers[name] = _measure_tower(folder / tower.file, tower, inputs[name], request, timer=timer)
    return manifest.with_towers(towers, target=OPENVINO.name)


def _measure_tower(model: Path, tower: Tower, inputs: Inputs, request: ExportRequest, *, timer: Timer) -> Tower:
    precision, threads = request.precision, request.threads
    reference = open_session(str(model), threads=threads)
    session = open_openvino(str(model), threads=threads, bf16=precision == "bf16")
    measured = measure(session, reference, inputs, threads=threads, timer=timer)
    note = ""
    if measured.speedup < 1:
        note = f"{precision}: OpenVINO takes {1 / measured.speedup:.2f} times as long here as float32 in ONNX Runtime."
    return msgspec.structs.replace(tower, precision=precision, note=note, measured=measured)
