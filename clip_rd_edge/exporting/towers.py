"""Convert a model's towers from PyTorch by another toolchain than ONNX's, and compare the files with the ONNX ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import nn

from clip_rd_edge.bundle.manifest import Manifest, Tower
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporting.conversion import start_conversion
from clip_rd_edge.exporting.graph import silently
from clip_rd_edge.exporting.int8.candidates import Opener
from clip_rd_edge.exporting.onnx import without_fast_path
from clip_rd_edge.exporting.options import ExportRequest
from clip_rd_edge.exporting.parity import Inputs, hard_inputs, measure
from clip_rd_edge.models.clip import ClipModel, TextTower, evaluation_mode, inference_image_tower
from clip_rd_edge.runtime.backends.session import open_session
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.reporting import SILENT, Reporter

MAX_DIFFERENCE = 1e-4  # of an entry of an embedding, from the float32 ONNX file's
TOWERS: dict[str, Callable[[nn.Module], nn.Module]] = {"image": inference_image_tower, "text": TextTower}
OTHER_FORMAT = "use --format onnx, which ONNX Runtime runs on phones as well"


@dataclass(frozen=True)
class Toolchain:
    """What converts towers to a format, and what runs them.

    Attributes:
        title: the runtime's name in messages.
        target: the runtime in the manifest.
        suffix: of the files.
        convert: returns the content of a file from the model, the name of a tower, its ONNX file's manifest entry, and
            inputs whose first row is an example; the file takes one input at a time.
        open: opens a file.
    """

    title: str
    target: str
    suffix: str
    convert: Callable[[ClipModel, str, Tower, Inputs], bytes]
    open: Opener


@contextlib.contextmanager
def on_cpu(module: nn.Module) -> Iterator[nn.Module]:
    """Move a module to the CPU to be traced, without the messages of what traces it; afterwards it is as it was."""
    device = next(module.parameters()).device
    with evaluation_mode(module), without_fast_path(), silently(), torch.no_grad():
        try:
            yield module.cpu()
        finally:
            module.to(device)


def write_towers(
    clip: ClipModel,
    source: Path,
    folder: Path,
    request: ExportRequest,
    *,
    tools: Toolchain,
    reporter: Reporter = SILENT,
) -> Manifest:
    """Write a model's towers in float32 into `folder`; return their manifest, not yet written.

    Latency is measured against the float32 ONNX files of the bundle `source`, with which the answers are compared.
    """
    manifest = start_conversion(source, folder, request)
    inputs = hard_inputs(source, manifest)
    towers = {}
    for name, tower in manifest.towers.items():
        reporter.update(f"{name} tower: converting to {tools.title}")
        file = f"{name}{tools.suffix}"
        write_bytes(folder / file, tools.convert(clip, name, tower, inputs[name]))
        converted = msgspec.structs.replace(tower, file=file, one_at_a_time=True)
        reporter.update(f"{name} tower: comparing {tools.title} with ONNX Runtime")
        reference = open_session(str(source / tower.file), threads=request.threads)
        session = tools.open(str(folder / file), threads=request.threads)
        measured = measure(session, reference, inputs[name], threads=request.threads)
        if not measured.max_difference <= MAX_DIFFERENCE:
            raise ClipRdEdgeError(
                f"{file} differs from the model by {measured.max_difference:.2g}; expected at most {MAX_DIFFERENCE:g}.",
                hint=OTHER_FORMAT,
            )
        note = ""
        if measured.speedup < 1:
            note = f"fp32: {tools.title} takes {1 / measured.speedup:.2f} times as long here as ONNX Runtime."
        towers[name] = msgspec.structs.replace(converted, note=note, measured=measured)
    return manifest.with_towers(towers, target=tools.target)
