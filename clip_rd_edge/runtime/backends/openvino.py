"""A bundle's towers in OpenVINO, which reads their ONNX as it is."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.bundle import Tower
from clip_rd_edge.contract.encoder import in_batches
from clip_rd_edge.errors import ConfigError, MissingExtraError, UsageError
from clip_rd_edge.runtime.encoder import BundleEncoder

BF16 = "bf16"
_MOST_SIZES = 3  # of batches that a model is compiled for; others are computed one by one


class _Input(NamedTuple):
    name: str


class OpenVinoModel:
    """A model with the two methods of an ONNX Runtime session that are used here; one call at a time runs.

    Where its batch alone is free, it is compiled for 1 at once, and for other sizes of batch when they first come:
    OpenVINO is faster where it knows all shapes, and its INT8 of small pictures is reported to crash on processors with
    AMX where it does not (ultralytics/ultralytics#25898).

    Args:
        read: the model as OpenVINO has read it.
        compile: compiles such a model.
    """

    def __init__(self, read: Any, compile: Callable[[Any], Any]) -> None:
        self._lock = threading.Lock()  # a request holds its inputs and outputs
        self._read, self._compile = read, compile
        self._inputs = [_Input(port.any_name) for port in read.inputs]
        self._outputs = [port.any_name for port in read.outputs]
        batch, *rest = read.inputs[0].partial_shape
        free = len(self._inputs) == 1 and batch.is_dynamic and not any(each.is_dynamic for each in rest)
        self._rest = [each.get_length() for each in rest] if free else None
        self._requests: dict[int, Any] = {}
        self._request(1)

    def get_inputs(self) -> list[_Input]:
        """The inputs, by their names."""
        return self._inputs

    def run(self, names: Sequence[str] | None, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The outputs of those names, or all, in their order; copies, which the next call leaves alone."""
        wanted = [i for i, name in enumerate(self._outputs) if names is None or name in names]
        count = len(next(iter(feed.values())))
        parts = []
        with self._lock:
            known = self._rest is None or count in self._requests or len(self._requests) < _MOST_SIZES
            size = count if known else 1
            for part in in_batches(count, size):
                found = self._request(size).infer({name: rows[part] for name, rows in feed.items()}, share_inputs=True)
                parts.append([found[i].copy() for i in wanted])
        return parts[0] if len(parts) == 1 else [np.concatenate(each) for each in zip(*parts, strict=True)]

    def _request(self, size: int) -> Any:
        key = size if self._rest is not None else 0
        if key not in self._requests:
            model = self._read
            if self._rest is not None:
                model = model.clone()
                model.reshape([size, *self._rest])
            self._requests[key] = self._compile(model).create_infer_request()
        return self._requests[key]


def open_openvino(model: str | bytes, *, threads: int | None = None, bf16: bool = False) -> OpenVinoModel:
    """Compile a model for the CPU.

    Args:
        model: an ONNX file's path or its content.
        threads: threads it runs on; None takes every core.
        bf16: compute float32 layers in bfloat16 where the processor can, which OpenVINO otherwise does unasked.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        ConfigError: it is no model that this OpenVINO can run.
    """
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise MissingExtraError("openvino", extra="openvino", purpose="Running a bundle in OpenVINO") from error
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
    }
    if threads is not None:
        if threads < 1:
            raise UsageError(f"threads is {threads}; at least 1 is needed.")
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        core = _core()
        read = core.read_model(model if isinstance(model, str) else io.BytesIO(model))
        return OpenVinoModel(read, lambda shaped: core.compile_model(shaped, "CPU", settings))
    except Exception as error:
        shown = model if isinstance(model, str) else "the model"
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"OpenVINO {openvino.__version__} cannot run {shown}: {reason}.") from error


@cache
def _core() -> Any:
    """The one Core of this process.

    Its plugin gives the thread that it begins in a stack for signals, and takes the memory back in the thread that it
    ends in: after that, the first signal that the process handles, such as that of an ended child, kills it.
    """
    import openvino

    return openvino.Core()


class OpenVinoEncoder(BundleEncoder):
    """A bundle in OpenVINO."""

    runtime = "openvino"

    def open_tower(self, tower: Tower) -> OpenVinoModel:
        """The compiled tower, in bfloat16 where its precision says so; raises as `open_openvino`."""
        path = str(self.folder / tower.file)
        return open_openvino(path, threads=self.threads, bf16=tower.precision.startswith(BF16))
