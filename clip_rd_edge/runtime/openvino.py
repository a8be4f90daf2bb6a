"""A bundle's towers in OpenVINO, which reads their ONNX as it is."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy.typing as npt

from clip_rd_edge.contract.bundle import Tower
from clip_rd_edge.errors import ConfigError, MissingExtraError, UsageError
from clip_rd_edge.runtime.bundle_encoder import BundleEncoder

BF16 = "bf16"


class _Input(NamedTuple):
    name: str


class OpenVinoModel:
    """A compiled model with the two methods of an ONNX Runtime session that are used here; one call at a time runs."""

    def __init__(self, compiled: Any) -> None:
        self._lock = threading.Lock()  # a request holds its inputs and outputs
        self._request = compiled.create_infer_request()
        self._inputs = [_Input(port.any_name) for port in compiled.inputs]
        self._outputs = compiled.outputs

    def get_inputs(self) -> list[_Input]:
        """The inputs, by their names."""
        return self._inputs

    def run(self, names: Sequence[str] | None, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The outputs of those names, or all, in their order; copies, which the next call leaves alone."""
        wanted = [port for port in self._outputs if names is None or port.any_name in names]
        with self._lock:
            found = self._request.infer(dict(feed), share_inputs=True)
            return [found[port].copy() for port in wanted]


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
        core = openvino.Core()
        read = core.read_model(model if isinstance(model, str) else io.BytesIO(model))
        return OpenVinoModel(core.compile_model(read, "CPU", settings))
    except Exception as error:
        shown = model if isinstance(model, str) else "the model"
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"OpenVINO {openvino.__version__} cannot run {shown}: {reason}.") from error


class OpenVinoEncoder(BundleEncoder):
    """A bundle in OpenVINO."""

    runtime = "openvino"

    def open_tower(self, tower: Tower) -> OpenVinoModel:
        """The compiled tower, in bfloat16 where its precision says so; raises as `open_openvino`."""
        path = str(self.folder / tower.file)
        return open_openvino(path, threads=self.threads, bf16=tower.precision.startswith(BF16))
