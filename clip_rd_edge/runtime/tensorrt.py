"""A bundle's towers in TensorRT, from the engines that lie beside their ONNX."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import msgspec

from clip_rd_edge.contract.bundle import ENGINE_SUFFIX, Manifest, Tower
from clip_rd_edge.contract.encoder import Description
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, MissingExtraError
from clip_rd_edge.runtime.bundle_encoder import BundleEncoder
from clip_rd_edge.runtime.engine import TensorRtModel, reason
from clip_rd_edge.runtime.providers import say

_RTX_TARGET = "tensorrt-rtx"
_PURPOSE = "Running an engine"


def open_engine(path: Path, *, rtx: bool) -> TensorRtModel:
    """Load an engine onto the first GPU.

    Args:
        rtx: it is one of TensorRT for RTX.

    Raises:
        MissingExtraError: TensorRT or cuda-bindings is not installed.
        ConfigError: there is no engine, no GPU, or the engine is for another one.
    """
    if not path.is_file():
        raise ConfigError(f"There is no engine {path}.", hint="build it on the device with the bundle's build.sh")
    if rtx:
        trt = _import("tensorrt_rtx_bindings", package="tensorrt-rtx-cu13-bindings", extra="rtx")
    else:
        trt = _import("tensorrt", package="tensorrt", extra="tensorrt")
    cuda = _import("cuda.bindings.runtime", package="cuda-bindings", extra="rtx" if rtx else "tensorrt")
    error, count = cuda.cudaGetDeviceCount()
    if int(error) or not count:
        why = reason(cuda, error) if int(error) else "CUDA finds none"
        raise ConfigError(f"There is no NVIDIA GPU to run {path} on: {why}.", hint="clip-rd-edge doctor")
    return TensorRtModel(path.read_bytes(), trt=trt, cuda=cuda)


class TensorRtEncoder(BundleEncoder):
    """A bundle in TensorRT.

    Args:
        required: whether an engine that cannot run here is an error; else that is said, and the ONNX that it came from
            runs on the CPU.
    """

    runtime = "tensorrt"

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None, required: bool = False) -> None:
        super().__init__(folder, manifest, threads=threads)
        self.required = required
        self._fell_back: dict[str, bool] = {}

    def describe(self) -> Description:
        """What this encoder is; runtime and device are those of the towers that were loaded."""
        description = super().describe()
        if self._fell_back and all(self._fell_back.values()):
            return msgspec.structs.replace(description, runtime="onnxruntime", device="cpu")
        return msgspec.structs.replace(description, device="cuda + cpu" if any(self._fell_back.values()) else "cuda")

    def open_tower(self, tower: Tower) -> Any:
        """The tower's engine, or its ONNX; raises as `open_engine` where engines are required."""
        name = tower.engine or Path(tower.file).with_suffix(ENGINE_SUFFIX).name
        try:
            model = open_engine(self.folder / name, rtx=self.manifest.target.startswith(_RTX_TARGET))
        except ClipRdEdgeError as error:
            if self.required:
                raise
            self._fell_back[tower.file] = True
            say(f"{tower.file} runs on the CPU in place of its engine. {error}")
            from clip_rd_edge.runtime.ort import open_session

            return open_session(str(self.folder / tower.file), threads=self.threads)
        self._fell_back[tower.file] = False
        return model


def _import(module: str, *, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(package, extra=extra, purpose=_PURPOSE) from error
