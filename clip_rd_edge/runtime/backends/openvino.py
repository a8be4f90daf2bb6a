"""Run a bundle's towers in OpenVINO, which reads the ONNX files directly."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy.typing as npt

from clip_rd_edge.bundle.manifest import Manifest, Tower
from clip_rd_edge.errors import ConfigError, in_one_line, needs_extra
from clip_rd_edge.runtime.backends.onnxruntime import IN_BF16, OPENVINO_PROCESSORS
from clip_rd_edge.runtime.encoder import AUTO, BundleEncoder, RunOptions, TowerModel
from clip_rd_edge.utils.paths import cache_home

BF16, CPU = "bf16", "CPU"
_TELEMETRY = "openvino_telemetry"
_NO_DRIVER = "install the driver of that processor, or use {device} openvino for the CPU"
_MAX_COMPILED_SIZES = 3  # batch sizes that a model is compiled for; batches of other sizes run one row at a time


class OpenVinoModel(TowerModel):
    """A model in OpenVINO.

    If only the batch dimension is dynamic, the model is compiled for batch size 1 at once, and for other batch sizes
    when they first occur: OpenVINO is faster with static shapes, and with dynamic ones its INT8 is reported to crash
    for small images on processors with AMX (ultralytics/ultralytics#25898).
    """

    def __init__(self, model: Any, compile: Callable[[Any], Any]) -> None:
        super().__init__([port.any_name for port in model.inputs])
        self._model, self._compile = model, compile
        self._outputs = [port.any_name for port in model.outputs]
        batch, *rest = model.inputs[0].partial_shape
        dynamic_batch = len(self._inputs) == 1 and batch.is_dynamic and not any(size.is_dynamic for size in rest)
        self._row_shape = [size.get_length() for size in rest] if dynamic_batch else None
        self._requests: dict[int, Any] = {}
        self._request(1)

    def compute(self, names: Sequence[str] | None, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        outputs = self._request(len(next(iter(feed.values())))).infer(feed, share_inputs=True)
        return [outputs[i].copy() for i, name in enumerate(self._outputs) if names is None or name in names]

    def batch_size(self, count: int) -> int:
        compiled = self._row_shape is None or count in self._requests or len(self._requests) < _MAX_COMPILED_SIZES
        return count if compiled else 1

    def _request(self, size: int) -> Any:
        key = size if self._row_shape is not None else 0
        if key not in self._requests:
            model = self._model
            if self._row_shape is not None:
                model = model.clone()
                model.reshape([size, *self._row_shape])
            self._requests[key] = self._compile(model).create_infer_request()
        return self._requests[key]


def open_openvino(
    model: str | bytes, *, threads: int | None = None, bf16: bool = False, processor: str = CPU
) -> OpenVinoModel:
    """Compile a model.

    Args:
        model: path of an ONNX file, or its bytes.
        threads: threads to run on; None uses every core. Only the CPU has threads.
        bf16: compute float32 layers in bfloat16 where the processor supports it; a GPU computes them in float16. False
            forces float32, which is not OpenVINO's default on such processors. An NPU always computes in float16.
        processor: `CPU`, `GPU` or `NPU`.
    """
    with needs_extra("openvino", extra="openvino", purpose="Running a bundle in OpenVINO"):
        openvino = _import_openvino()
    core = _core()
    settings = _settings(processor, threads=threads, bf16=bf16)
    try:
        graph = _read(core, model)
        return OpenVinoModel(graph, lambda shaped: core.compile_model(shaped, processor, settings))
    except Exception as error:
        name = model if isinstance(model, str) else "the model"
        reason = f"OpenVINO {openvino.__version__} cannot run {name} on a {processor}: {in_one_line(error)}."
        raise ConfigError(reason, hint=_NO_DRIVER if processor != CPU else "") from error


def _read(core: Any, model: str | bytes) -> Any:
    """Read a model, if named .onnx as ONNX: OpenVINO goes by content, and may find a graph with files beside it."""
    if not isinstance(model, str):
        return core.read_model(io.BytesIO(model))
    if not model.endswith(".onnx"):
        return core.read_model(model)
    reader = _import_openvino().frontend.FrontEndManager().load_by_framework("onnx")
    return reader.convert(reader.load(model))


def available_processors() -> list[str]:
    """Return the kinds of processors that OpenVINO finds, such as CPU and GPU; two GPUs are one kind."""
    return list(dict.fromkeys(name.split(".")[0] for name in _core().available_devices))


def _settings(processor: str, *, threads: int | None, bf16: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if processor == CPU:
        settings |= {"NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        return settings
    if processor != "NPU":  # which refuses the hint: it knows float16 and integers alone
        settings["INFERENCE_PRECISION_HINT"] = "f16" if bf16 else "f32"
    return {**settings, "CACHE_DIR": str(cache_home() / "openvino")}  # compiling takes seconds to minutes


@cache
def _core() -> Any:
    """Return the one Core of this process, which is never freed.

    Its CPU plugin sets up a signal stack for the thread that creates it and frees that memory in the thread that
    destroys it: after that, the first signal that the process handles, such as SIGCHLD, would kill it.
    """
    return _import_openvino().Core()


def _import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which on import reports to Google Analytics and stores an id of the user.

    No variable switches that off, but OpenVINO also works without the package openvino_telemetry.
    """
    is_ours = _TELEMETRY not in sys.modules  # else the program uses it already
    if is_ours:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    finally:
        if is_ours:
            sys.modules.pop(_TELEMETRY, None)


class OpenVinoEncoder(BundleEncoder):
    """A bundle in OpenVINO."""

    runtime, devices = "openvino", (AUTO, "cpu", *OPENVINO_PROCESSORS)

    def __init__(self, folder: Path, manifest: Manifest, options: RunOptions | None = None) -> None:
        super().__init__(folder, manifest, options)
        self.processor = OPENVINO_PROCESSORS.get(self.options.device, CPU)
        self._in_bf16 = self.options.device == IN_BF16

    def device_for(self, tower: Tower) -> str:
        return f"{self.processor.lower()}{f'-{BF16}' if self._in_bf16 else ''}"

    def open_tower(self, tower: Tower) -> OpenVinoModel:
        path, bf16 = str(self.folder / tower.file), self._in_bf16 or tower.precision.startswith(BF16)
        return open_openvino(path, threads=self.threads, bf16=bf16, processor=self.processor)
