"""Convert a model's towers from PyTorch to LiteRT, in float32, by litert-torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from clip_rd_edge.contract.bundle import Manifest, Tower
from clip_rd_edge.convert.bundle import start_conversion
from clip_rd_edge.convert.fp16 import hard_inputs
from clip_rd_edge.convert.graph import silently
from clip_rd_edge.convert.litert import LITERT
from clip_rd_edge.convert.options import ExportRequest
from clip_rd_edge.convert.parity import Inputs, Timer, agreement, embed, latencies, measurement
from clip_rd_edge.errors import ClipRdEdgeError, MissingExtraError
from clip_rd_edge.exporters.onnx import evaluating, root_cause, without_fast_path
from clip_rd_edge.models.clip import ClipModel, ImageTower, TextTower
from clip_rd_edge.runtime.backends.litert import open_litert
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.io import write_bytes
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.timing import time_in_turn

MAX_DIFFERENCE = 1e-4  # of an entry of an embedding, from the float32 ONNX file's
_TOWERS = {"image": ImageTower, "text": TextTower}
_HINT = "use --format onnx, which ONNX Runtime runs on phones as well"


class _NamedTower(nn.Module):
    """A tower whose output has a name; `convert.litert` finds its operators by the name of the attribute `tower`."""

    def __init__(self, tower: nn.Module, output: str) -> None:
        super().__init__()
        self.tower, self.output = tower, output

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        (rows,) = inputs.values()
        return {self.output: self.tower(rows)}


def require_litert_torch() -> None:
    """Raise MissingExtraError if litert-torch or what it needs here is not installed."""
    packages = {"litert_torch": "litert-torch", "ai_edge_quantizer": "ai-edge-quantizer"}
    for module, package in {**packages, "ai_edge_litert": "ai-edge-litert"}.items():
        if find_spec(module) is None:
            raise MissingExtraError(package, extra="litert-torch", purpose="Exporting for LiteRT")


def write_litert(
    clip: ClipModel,
    source: Path,
    folder: Path,
    request: ExportRequest,
    *,
    reporter: Reporter = SILENT,
    timer: Timer = time_in_turn,
) -> Manifest:
    """Write a model's towers as float32 LiteRT files into `folder`; return their manifest, not yet written.

    Latency is measured against the float32 ONNX files of the bundle `source`, with which the answers are compared.

    Raises:
        UsageError: `source` is not a float32 bundle, or is damaged.
        ClipRdEdgeError: a tower cannot be converted, or its file computes something else than the model.
    """
    manifest = start_conversion(source, folder)
    inputs = hard_inputs(source, manifest)
    towers = {}
    for name, tower in manifest.towers.items():
        reporter.update(f"{name} tower: converting to LiteRT")
        file = f"{name}.tflite"
        write_bytes(folder / file, convert_tower(clip, name, tower, inputs[name]))
        converted = msgspec.structs.replace(tower, file=file, one_at_a_time=True)
        reporter.update(f"{name} tower: comparing LiteRT with ONNX Runtime")
        towers[name] = _measured(converted, folder / file, source / tower.file, inputs[name], request, timer)
    return manifest.with_towers(towers, target=LITERT)


def convert_tower(clip: ClipModel, name: str, tower: Tower, inputs: Inputs) -> bytes:
    """Return the content of a LiteRT file of the tower `name`, for one input like those of `inputs`.

    Args:
        tower: its ONNX file's entry, whose names of input and output are kept.
        inputs: (N, 3, H, W) float32 or (N, T) int64; LiteRT's file takes int32 ids.

    Raises:
        ClipRdEdgeError: litert-torch cannot convert the tower.
    """
    with silently():  # it logs which of its optional parts are missing
        import litert_torch
        from litert_torch import progress

    example = torch.from_numpy(inputs[:1])
    if not example.is_floating_point():
        example = example.to(torch.int32)
    module = _NamedTower(_TOWERS[name](clip.model), tower.output_name)
    device = next(module.parameters()).device
    progress.console.quiet = True
    try:
        with evaluating(module), without_fast_path(), silently(), torch.no_grad():
            model = litert_torch.convert(module.cpu(), sample_kwargs={tower.input_name: example})
            return bytes(model.model_content())
    except Exception as error:  # it raises many types, with the whole graph in their messages
        raise ClipRdEdgeError(
            f"litert-torch cannot convert the {name} tower of {clip.name}: {root_cause(error)}.", hint=_HINT
        ) from error
    finally:
        module.to(device)


def _measured(tower: Tower, file: Path, onnx: Path, inputs: Inputs, request: ExportRequest, timer: Timer) -> Tower:
    """Return a tower's entry with its measurements; raise ClipRdEdgeError if it differs from the ONNX file."""
    sessions = {
        "onnx": open_session(str(onnx), threads=request.threads),
        LITERT: open_litert(str(file), threads=request.threads),
    }
    parity = agreement(embed(sessions["onnx"], inputs), embed(sessions[LITERT], inputs))
    if not parity.max_difference <= MAX_DIFFERENCE:
        raise ClipRdEdgeError(
            f"{file.name} differs from the model by {parity.max_difference:.2g}; expected at most {MAX_DIFFERENCE:g}.",
            hint=_HINT,
        )
    latencies_ms = latencies(sessions, inputs, timer=timer)
    measured = measurement(parity, latencies_ms[LITERT], reference_ms=latencies_ms["onnx"], threads=request.threads)
    note = ""
    if measured.speedup < 1:
        note = f"fp32: LiteRT takes {1 / measured.speedup:.2f} times as long here as ONNX Runtime."
    return msgspec.structs.replace(tower, note=note, measured=measured)
