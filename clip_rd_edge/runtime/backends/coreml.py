"""Run a bundle's towers in Core ML, on a Mac. Its packages take one input at a time."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.encoder import Description
from clip_rd_edge.bundle.manifest import Tower
from clip_rd_edge.errors import ConfigError, in_one_line, needs_extra
from clip_rd_edge.runtime.encoder import AUTO, BundleEncoder, OneInputModel, Placement

COREML = "coreml"
_CPU = "cpu"


class CoreMlModel(OneInputModel):
    """A model in Core ML.

    Args:
        model: a coremltools MLModel with one input and one output, for a batch of one.
        tower: the names of both.
    """

    def __init__(self, model: Any, tower: Tower) -> None:
        super().__init__([tower.input_name])
        self._model, self._tower = model, tower

    def run_row(self, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """See `OneInputModel`; ids are given as int32, and the output is returned as float32."""
        if row.dtype == np.int64:
            row = row.astype(np.int32)
        output: npt.NDArray[Any] = self._model.predict({self._tower.input_name: row[None]})[self._tower.output_name]
        return output.astype(np.float32)


def open_coreml(package: Path, tower: Tower, *, cpu_only: bool = False) -> CoreMlModel:
    """Open a package, which compiles it for this Mac."""
    with needs_extra("coremltools", extra=COREML, purpose="Running a bundle in Core ML"):
        import coremltools
    system = platform.system()
    if system != "Darwin":
        raise ConfigError(
            f"Core ML runs on a Mac alone, not on {system}: {package} was converted, but cannot run here.",
            hint="export with --format onnx for this machine",
        )
    units = coremltools.ComputeUnit.CPU_ONLY if cpu_only else coremltools.ComputeUnit.ALL
    try:
        return CoreMlModel(coremltools.models.MLModel(str(package), compute_units=units), tower)
    except Exception as error:
        raise ConfigError(f"Core ML cannot run {package}: {in_one_line(error)}.") from error


class CoreMlEncoder(BundleEncoder):
    """A bundle in Core ML, which chooses among the CPU, the GPU and the Neural Engine if the device is not `cpu`."""

    runtime, devices = COREML, (AUTO, COREML, _CPU)

    @property
    def cpu_only(self) -> bool:
        """Whether it runs on the CPU alone."""
        return self.options.device == _CPU

    def describe(self) -> Description:
        """Describe this encoder; `device` is `coreml` or `cpu`, as in `placement`."""
        return msgspec.structs.replace(super().describe(), device=self.placement(self.manifest.image).device)

    def placement(self, tower: Tower) -> Placement:
        """Return where a tower is meant to run: Core ML does not say which of a Mac's processors it chose."""
        return Placement(COREML, _CPU if self.cpu_only else COREML)

    def open_tower(self, tower: Tower) -> CoreMlModel:
        """Open the tower's package; raises as `open_coreml`."""
        return open_coreml(self.folder / tower.file, tower, cpu_only=self.cpu_only)
