"""A bundle for OpenVINO from a float32 one: the same ONNX, run and measured by OpenVINO. Never imports torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from clip_rd_edge.contract.bundle import Manifest, Tower
from clip_rd_edge.convert.bundle import open_source
from clip_rd_edge.convert.fp16 import probes_of
from clip_rd_edge.convert.int8.candidates import OPENVINO
from clip_rd_edge.convert.options import ExportRequest
from clip_rd_edge.convert.parity import Inputs, Timer, agreement, embed, latencies, measurement
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

    bf16 is a hint to OpenVINO, which the file does not show; it is kept in the manifest. Latency is measured beside
    ONNX Runtime's float32.

    Raises:
        UsageError: `source` is no float32 bundle, or is damaged.
        MissingExtraError: OpenVINO is not installed.
        ConfigError: OpenVINO does not run a tower.
    """
    manifest = open_source(source, folder)
    probes = probes_of(source, manifest)
    towers = {}
    for name, tower in manifest.towers.items():
        reporter.update(f"{name} tower: measuring OpenVINO beside ONNX Runtime")
        shutil.copy2(source / tower.file, folder / tower.file)
        towers[name] = _measured(folder / tower.file, tower, probes[name], request, timer=timer)
    return manifest.with_towers(towers, target=OPENVINO.name)


def _measured(model: Path, tower: Tower, probes: Inputs, request: ExportRequest, *, timer: Timer) -> Tower:
    precision, threads = request.precision, request.threads
    sessions = {
        "fp32": open_session(str(model), threads=threads),
        "openvino": open_openvino(str(model), threads=threads, bf16=precision == "bf16"),
    }
    of = agreement(embed(sessions["fp32"], probes), embed(sessions["openvino"], probes))
    times = latencies(sessions, probes, timer=timer)
    measured = measurement(of, times["openvino"], reference=times["fp32"], threads=threads)
    note = ""
    if measured.speedup < 1:
        note = f"{precision}: OpenVINO takes {1 / measured.speedup:.2f} times as long here as ONNX Runtime's float32."
    return msgspec.structs.replace(tower, precision=precision, note=note, measured=measured)
