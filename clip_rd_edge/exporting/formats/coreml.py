"""Core ML: packages from PyTorch, whose declarations are checked. They run on a Mac alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from clip_rd_edge.bundle.manifest import Tower
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporting.formats import Converted, Format, Job
from clip_rd_edge.exporting.parity import Inputs
from clip_rd_edge.exporting.towers import TOWERS, converting, example_row, on_cpu
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.one_input import COREML
from clip_rd_edge.utils.process import WITHOUT_PROGRESS_BARS

NOT_RUN = "converted but not run: Core ML runs on a Mac alone, where clip-rd-edge verify compares its answers"
_HINT = "use {format} onnx, which ONNX Runtime runs on Apple devices as well"


class CoreMl(Format):
    """Core ML packages, converted from PyTorch, in float32 or float16; nothing but a Mac runs them."""

    packages, extra = ("coremltools",), COREML

    def convert(self, job: Job) -> Converted:
        """Write the bundle; what a package declares is compared with the source."""
        precision = job.plan.precision

        def convert(name: str, tower: Tower) -> Tower:
            package = job.folder / f"{name}.mlpackage"
            with WITHOUT_PROGRESS_BARS:
                write_package(job.clip, name, tower, job.inputs[name], package, half=precision == "fp16")
            require_declared(package, tower, job.inputs[name], job.fp32.embedding_size)
            return msgspec.structs.replace(
                tower, file=package.name, precision=precision, one_at_a_time=True, note=NOT_RUN, measured=None
            )

        return job.convert_towers(convert, doing="converting to Core ML", target=COREML)

    def runnable(self, job: Job) -> Path:
        """Return the float32 bundle in ONNX, whose answers the packages are to give on a Mac."""
        return job.source


class _OneInput(nn.Module):
    """A tower whose input has a fixed number of rows and, in the traced graph, the name `rows`."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, rows: Tensor) -> Tensor:
        output: Tensor = self.tower(rows)
        return output


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

    example, module = example_row(inputs), _OneInput(TOWERS[name](clip.model))
    dtype: Any = np.float32 if example.is_floating_point() else np.int32
    with converting("coremltools", name, clip, hint=_HINT), on_cpu(module):
        model = coremltools.convert(
            _exported(module, example),
            inputs=[coremltools.TensorType(name=tower.input_name, shape=tuple(example.shape), dtype=dtype)],
            outputs=[coremltools.TensorType(name=tower.output_name, dtype=np.float32)],
            convert_to="mlprogram",
            compute_precision=coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32,
            minimum_deployment_target=coremltools.target.iOS16,
            skip_model_load=True,
        )
        model.save(str(package))
    _remove_what_is_not_needed(package)


def _exported(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Return a module's graph without `alias`, an identity that Swin's windows leave and coremltools does not know."""
    program: torch.export.ExportedProgram = torch.export.export(module, (example,), strict=False).run_decompositions(
        {torch.ops.aten.alias.default: lambda tensor: tensor}
    )
    return program


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
    ports = [(port.name, port.type.multiArrayType) for port in (*description.input, *description.output)]
    declared = [(name, tuple(array.shape), array.ArrayDataType.Name(array.dataType)) for name, array in ports]
    if declared != expected:
        raise ClipRdEdgeError(f"{package.name} declares {declared}; expected {expected}.", hint=_HINT)
