"""A bundle's towers in TensorRT, from the engines that lie beside their ONNX."""

from __future__ import annotations

import importlib
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.bundle import ENGINE_SUFFIX, Manifest, Tower
from clip_rd_edge.contract.encoder import Description, in_batches
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, MissingExtraError
from clip_rd_edge.runtime.backends.providers import say
from clip_rd_edge.runtime.encoder import BundleEncoder

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
            from clip_rd_edge.runtime.backends.onnxruntime import open_session

            return open_session(str(self.folder / tower.file), threads=self.threads)
        self._fell_back[tower.file] = False
        return model


def _import(module: str, *, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(package, extra=extra, purpose=_PURPOSE) from error


class _Input(NamedTuple):
    name: str


class _Buffer(NamedTuple):
    """An input's or output's place on the GPU."""

    address: int
    dtype: npt.DTypeLike


class TensorRtModel:
    """An engine with the two methods of an ONNX Runtime session that are used here; one call at a time runs.

    Args:
        content: the engine's file.
        trt: TensorRT's module, `tensorrt` or `tensorrt_rtx_bindings`.
        cuda: cuda-bindings' runtime module.

    Raises:
        ConfigError: the engine was built for another GPU or another TensorRT.
        ClipRdEdgeError: CUDA refuses, for instance because its memory is full.
    """

    def __init__(self, content: bytes, *, trt: Any, cuda: Any) -> None:
        self._cuda = cuda
        self._lock = threading.Lock()  # a context holds its shapes and addresses
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))  # the engine needs it as long as it lives
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise ConfigError(
                f"TensorRT {trt.__version__} does not take the engine: it was built for another GPU or version.",
                hint="export it for this GPU, or build it here with its build.sh",
            )
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self._inputs = [name for name in names if is_input[name]]
        self._outputs = [name for name in names if not is_input[name]]
        greatest = {name: tuple(self._engine.get_tensor_profile_shape(name, 0)[2]) for name in self._inputs}
        self._max_batch = min(shape[0] for shape in greatest.values())
        for name, shape in greatest.items():
            self._context.set_input_shape(name, shape)
        self._stream = _checked(cuda, cuda.cudaStreamCreate())
        self._buffers: dict[str, _Buffer] = {}
        weakref.finalize(self, _free, cuda, self._buffers, self._stream)
        for name in names:
            dtype = trt.nptype(self._engine.get_tensor_dtype(name))
            size = int(np.prod(tuple(self._context.get_tensor_shape(name)))) * np.dtype(dtype).itemsize
            self._buffers[name] = _Buffer(int(_checked(cuda, cuda.cudaMalloc(size))), dtype)
            self._context.set_tensor_address(name, self._buffers[name].address)

    def get_inputs(self) -> list[_Input]:
        """The inputs, by their names."""
        return [_Input(name) for name in self._inputs]

    def run(self, names: Sequence[str] | None, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The outputs of those names, or all, float32; more rows than the engine was built for go in parts.

        Names do not matter where there is one input and one output, which torch-tensorrt gives names of its own.
        """
        wanted = self._outputs if names is None or len(self._outputs) == 1 else list(names)
        if len(self._inputs) == 1:
            feed = dict(zip(self._inputs, feed.values(), strict=True))
        count = len(next(iter(feed.values())))
        with self._lock:
            parts = [
                self._run(wanted, {name: values[batch] for name, values in feed.items()})
                for batch in in_batches(count, self._max_batch)
            ]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def _run(self, wanted: Sequence[str], feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
        cuda, kinds = self._cuda, self._cuda.cudaMemcpyKind
        given = {name: np.ascontiguousarray(values, self._buffers[name].dtype) for name, values in feed.items()}
        for name, values in given.items():
            self._context.set_input_shape(name, values.shape)
            self._copy(self._buffers[name].address, values.ctypes.data, values.nbytes, kinds.cudaMemcpyHostToDevice)
        if not self._context.execute_async_v3(self._stream):
            raise ClipRdEdgeError("TensorRT could not run the engine; its reason stands above.")
        taken = []
        for name in wanted:
            buffer = self._buffers[name]
            values = np.empty(tuple(self._context.get_tensor_shape(name)), buffer.dtype)
            self._copy(values.ctypes.data, buffer.address, values.nbytes, kinds.cudaMemcpyDeviceToHost)
            taken.append(values)
        _checked(cuda, cuda.cudaStreamSynchronize(self._stream))
        return [values.astype(np.float32, copy=False) for values in taken]

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        _checked(self._cuda, self._cuda.cudaMemcpyAsync(to, source, size, kind, self._stream))


def _checked(cuda: Any, answer: tuple[Any, ...]) -> Any:
    """What a CUDA call gives, after its error code."""
    error, *given = answer
    if int(error):
        raise ClipRdEdgeError(f"CUDA failed: {reason(cuda, error)}.")
    return given[0] if given else None


def reason(cuda: Any, error: Any) -> str:
    _, text = cuda.cudaGetErrorString(error)
    return text.decode() if isinstance(text, bytes) else str(text)


def _free(cuda: Any, buffers: dict[str, _Buffer], stream: Any) -> None:
    for buffer in buffers.values():
        cuda.cudaFree(buffer.address)
    cuda.cudaStreamDestroy(stream)
