"""A TensorRT engine on the GPU, with cuda-bindings; neither torch nor onnxruntime is loaded.

No GPU has run this yet: it was written against the bindings of TensorRT for RTX 1.7 and the documentation of
TensorRT 10, and is tested against a stand-in for both.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.encoder import in_batches
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError


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
