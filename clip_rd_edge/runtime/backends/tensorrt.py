"""Run a bundle's towers in TensorRT, from the engines beside its ONNX files."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.manifest import ENGINE_SUFFIX, Tower, require_current_engine
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, MissingExtraError
from clip_rd_edge.runtime.backends.onnxruntime import DEVICES, open_session
from clip_rd_edge.runtime.encoder import BundleEncoder, Placement, TowerModel, warn

_RTX_TARGET = "tensorrt-rtx"
_PURPOSE = "Running an engine"


def open_engine(path: Path, *, rtx: bool) -> TensorRtModel:
    """Load an engine, with `rtx` one of TensorRT for RTX, onto the first GPU."""
    if not path.is_file():
        raise ConfigError(
            f"The engine {path} does not exist.", hint="build it on the device with the bundle's build.sh"
        )
    if rtx:
        trt = _import("tensorrt_rtx_bindings", package="tensorrt-rtx-cu13-bindings", extra="rtx")
    else:
        trt = _import("tensorrt", package="tensorrt", extra="tensorrt")
    cuda = _import("cuda.bindings.runtime", package="cuda-bindings", extra="rtx" if rtx else "tensorrt")
    _checked(cuda, cuda.cudaGetDeviceCount())  # without a driver or a GPU, it is an error
    return TensorRtModel(path.read_bytes(), trt=trt, cuda=cuda)


class TensorRtEncoder(BundleEncoder):
    """A bundle in TensorRT.

    If an engine cannot run here, a warning is logged, and the ONNX file that it was built from runs on the CPU; if the
    runtime was asked for, it is an error instead.
    """

    runtime, devices = "tensorrt", DEVICES

    def device_for(self, tower: Tower) -> str:
        return "cuda"

    def open_tower(self, tower: Tower) -> Any:
        """Open the tower's engine, or else its ONNX file."""
        name = tower.engine or Path(tower.file).with_suffix(ENGINE_SUFFIX).name
        try:
            if not tower.engine:
                require_current_engine(self.folder, self.manifest, tower, name)
            return open_engine(self.folder / name, rtx=self.manifest.target.startswith(_RTX_TARGET))
        except ClipRdEdgeError as error:
            if self.options.required:
                raise
            fallback = f"its engine did not run: {str(error).rstrip('.')}"
            self._placements[tower.file] = Placement("onnxruntime", "cpu", fallback, error.hint)
            to_do = f" To use the engine: {error.hint}." if error.hint else ""
            warn(f"{tower.file} runs on the CPU instead of its engine. {error}{to_do}")
            return open_session(str(self.folder / tower.file), threads=self.threads)


def _import(module: str, *, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(package, extra=extra, purpose=_PURPOSE) from error


class _Buffer(NamedTuple):
    address: int
    dtype: npt.DTypeLike


class TensorRtModel(TowerModel):
    """An engine on a GPU."""

    def __init__(self, content: bytes, *, trt: Any, cuda: Any) -> None:
        self._cuda = cuda
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise ConfigError(
                f"TensorRT {trt.__version__} rejected the engine: it was built for another GPU or version.",
                hint="export the bundle for this GPU, or build the engine here with the bundle's build.sh",
            )
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        inputs = [name for name in names if is_input[name]]
        super().__init__(inputs)
        self._outputs = [name for name in names if not is_input[name]]
        max_shapes = {name: tuple(self._engine.get_tensor_profile_shape(name, 0)[2]) for name in inputs}
        self._max_batch = int(min(shape[0] for shape in max_shapes.values()))
        for name, shape in max_shapes.items():
            self._context.set_input_shape(name, shape)
        self._stream = _checked(cuda, cuda.cudaStreamCreate())
        self._buffers: dict[str, _Buffer] = {}
        weakref.finalize(self, _free, cuda, self._buffers, self._stream)
        for name in names:
            dtype = trt.nptype(self._engine.get_tensor_dtype(name))
            size_bytes = int(np.prod(tuple(self._context.get_tensor_shape(name)))) * np.dtype(dtype).itemsize
            self._buffers[name] = _Buffer(int(_checked(cuda, cuda.cudaMalloc(size_bytes))), dtype)
            self._context.set_tensor_address(name, self._buffers[name].address)

    def compute(self, names: Sequence[str] | None, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Run the engine; return the named outputs, or all, as float32.

        A single input or output is used whatever its name, because torch-tensorrt renames them.
        """
        selected = self._outputs if names is None or len(self._outputs) == 1 else names
        if len(self._inputs) == 1:
            feed = {self._inputs[0].name: next(iter(feed.values()))}
        cuda, kinds = self._cuda, self._cuda.cudaMemcpyKind
        inputs = {name: np.ascontiguousarray(values, self._buffers[name].dtype) for name, values in feed.items()}
        for name, values in inputs.items():
            self._context.set_input_shape(name, values.shape)
            self._copy(self._buffers[name].address, values.ctypes.data, values.nbytes, kinds.cudaMemcpyHostToDevice)
        if not self._context.execute_async_v3(self._stream):
            raise ClipRdEdgeError("TensorRT could not run the engine; it logged the reason above.")
        outputs = []
        for name in selected:
            buffer = self._buffers[name]
            values = np.empty(tuple(self._context.get_tensor_shape(name)), buffer.dtype)
            self._copy(values.ctypes.data, buffer.address, values.nbytes, kinds.cudaMemcpyDeviceToHost)
            outputs.append(values)
        _checked(cuda, cuda.cudaStreamSynchronize(self._stream))
        return [values.astype(np.float32, copy=False) for values in outputs]

    def batch_size(self, count: int) -> int:
        return self._max_batch

    def _copy(self, target: int, source: int, size_bytes: int, kind: Any) -> None:
        _checked(self._cuda, self._cuda.cudaMemcpyAsync(target, source, size_bytes, kind, self._stream))


def _checked(cuda: Any, result: tuple[Any, ...]) -> Any:
    """Return the value of a CUDA call's (error, value) result; raise if the call failed."""
    error, *values = result
    if int(error):
        _, text = cuda.cudaGetErrorString(error)
        reason = text.decode() if isinstance(text, bytes) else text
        raise ClipRdEdgeError(f"CUDA failed: {reason}.", hint="run clip-rd-edge doctor")
    return values[0] if values else None


def _free(cuda: Any, buffers: dict[str, _Buffer], stream: Any) -> None:
    for buffer in buffers.values():
        cuda.cudaFree(buffer.address)
    cuda.cudaStreamDestroy(stream)
