"""Convert a model's towers from PyTorch to Core ML packages, and check what they declare. They run on a Mac alone."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from clip_rd_edge.bundle.manifest import Manifest, Tower
from clip_rd_edge.errors import ClipRdEdgeError, MissingExtraError, UsageError
from clip_rd_edge.exporting.conversion import start_conversion
from clip_rd_edge.exporting.parity import Inputs, hard_inputs
from clip_rd_edge.exporting.plan import ExportRequest
from clip_rd_edge.exporting.towers import TOWERS, on_cpu, root_cause
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.coreml import COREML
from clip_rd_edge.utils.process import without_progress_bars
from clip_rd_edge.utils.reporting import SILENT, Reporter

NOT_RUN = "converted and not run: Core ML runs on a Mac alone, where clip-rd-edge verify compares its answers"
_HINT = "use {format} onnx, which ONNX Runtime runs on Apple devices as well"


class _OneInput(nn.Module):
    """A tower whose input has a fixed number of rows and, in the traced graph, the name `rows`."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, rows: Tensor) -> Tensor:
        output: Tensor = self.tower(rows)
        return output


def require_coremltools() -> None:
    """Raise MissingExtraError if coremltools is not installed, and UsageError if its compiled part is missing."""
    found = find_spec("coremltools")
    if found is None:
        raise MissingExtraError("coremltools", extra=COREML, purpose="Exporting for Core ML")
    folders = map(Path, found.submodule_search_locations or ())
    if not any(any(folder.glob("libmilstoragepython*")) for folder in folders):
        # pip installs the sources as they are where PyPI has no wheel for this Python.
        raise UsageError(
            "The installed coremltools has no compiled part, without which it writes no file: there is no wheel of it "
            "for this Python.",
            hint="pip install --pre -U coremltools, or use an older Python",
        )


def write_coreml(
    clip: ClipModel, source: Path, folder: Path, request: ExportRequest, *, reporter: Reporter = SILENT
) -> Manifest:
    """Write a model's towers as Core ML packages into `folder`, in float32 or float16; return their manifest.

    What a package declares is compared with the bundle `source`: names, shapes and types of input and output.
    """
    manifest = start_conversion(source, folder, request)
    inputs = hard_inputs(source, manifest)
    towers = {}
    for name, tower in manifest.towers.items():
        reporter.update(f"{name} tower: converting to Core ML")
        package = folder / f"{name}.mlpackage"
        with without_progress_bars():
            write_package(clip, name, tower, inputs[name], package, half=request.precision == "fp16")
        require_declared(package, tower, inputs[name], manifest.embedding_size)
        towers[name] = msgspec.structs.replace(
            tower, file=package.name, precision=request.precision, one_at_a_time=True, note=NOT_RUN, measured=None
        )
    return manifest.with_towers(towers, target=COREML)


def write_package(
    clip: ClipModel, name: str, tower: Tower, inputs: Inputs, package: Path, *, half: bool = False
) -> None:
    """Write the package of the tower `name`, for one input like those of `inputs`.

    Args:
        tower: its ONNX file's entry, whose names of input and output are kept.
        inputs: (N, 3, H, W) float32 or (N, T) int64; the package takes int32 ids.
        package: the folder to write.
        half: compute in float16, as the Neural Engine does; input and output stay in float32.
    """
    import coremltools

    example = torch.from_numpy(inputs[:1])
    if not example.is_floating_point():
        example = example.to(torch.int32)
    module = _OneInput(TOWERS[name](clip.model))
    precision = coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32
    port = coremltools.TensorType(name=tower.input_name, shape=tuple(example.shape), dtype=inputs_type(example))
    try:
        with on_cpu(module):
            model = coremltools.convert(
                _exported(module, example),
                inputs=[port],
                outputs=[coremltools.TensorType(name=tower.output_name, dtype=np.float32)],
                convert_to="mlprogram",
                compute_precision=precision,
                minimum_deployment_target=coremltools.target.iOS16,
                skip_model_load=True,
            )
            model.save(str(package))
    except Exception as error:  # it raises many types
        raise ClipRdEdgeError(
            f"coremltools cannot convert the {name} tower of {clip.name}: {root_cause(error)}.", hint=_HINT
        ) from error
    _remove_what_is_not_needed(package)


def _exported(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Return a module's graph without `alias`, an identity that Swin's windows leave and coremltools does not know."""
    program: torch.export.ExportedProgram = torch.export.export(module, (example,), strict=False).run_decompositions(
        {torch.ops.aten.alias.default: lambda tensor: tensor}
    )
    return program


def inputs_type(example: Tensor) -> Any:
    """Return the numpy type of an example input."""
    return np.float32 if example.is_floating_point() else np.int32


def _remove_what_is_not_needed(package: Path) -> None:
    """Keep the package's index and its data: the converter adds notes of its own, and closes files to other users."""
    for path in package.iterdir():
        if path.name not in ("Manifest.json", "Data"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in package.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def require_declared(package: Path, tower: Tower, inputs: Inputs, embedding_size: int) -> None:
    """Raise ClipRdEdgeError unless a package declares the names, shapes and types that the bundle's tower has."""
    import coremltools

    description = coremltools.utils.load_spec(str(package)).description
    ids = inputs.ndim == 2
    expected = [
        (tower.input_name, (1, *inputs.shape[1:]), "INT32" if ids else "FLOAT32"),
        (tower.output_name, (1, embedding_size), "FLOAT32"),
    ]
    declared = [_declaration(port) for port in (*description.input, *description.output)]
    if declared != expected:
        raise ClipRdEdgeError(f"{package.name} declares {declared}; expected {expected}.", hint=_HINT)


def _declaration(port: Any) -> tuple[str, tuple[int, ...], str]:
    array = port.type.multiArrayType
    return port.name, tuple(array.shape), array.ArrayDataType.Name(array.dataType)
