"""Build engines from ONNX by TensorRT for RTX; TensorRT proper builds them on the device (`tensorrt.bundle`).

Networks are strongly typed: the ONNX sets every type (`formats.onnx`, `int8.symmetric`), because TensorRT 11 has
neither precision flags nor calibrators, and TensorRT 10 and TensorRT for RTX do not need them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_rd_edge.errors import ClipRdEdgeError, MissingExtraError, first_line

MAX_BATCH = 8  # of every engine, however it is built


@dataclass(frozen=True)
class Engine:
    """The content of an engine file, and the builder's log, which lists its layers (see `parse_kernels`)."""

    content: bytes
    log: str


def build_engine(model: bytes, *, target: str) -> Engine:
    """Build an engine for batches of 1 to MAX_BATCH, tuned for 1.

    Args:
        model: content of a strongly typed ONNX file with one input, whose first dimension is the batch.
        target: one of RTX_TARGETS.
    """
    trt = _import_tensorrt_rtx()
    logger = _logger(trt)
    builder = trt.Builder(logger)
    # From version 11 on, every network is strongly typed, and the flag is gone.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        reasons = [parser.get_error(i) for i in range(parser.num_errors)]
        raise ClipRdEdgeError(
            f"TensorRT for RTX {trt.__version__} cannot parse the ONNX: {_first_reason(reasons)}.",
            hint="export in another precision, or use another architecture",
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    config.add_optimization_profile(_profile(builder, network.get_input(0)))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = _first_reason(logger.errors)
        raise ClipRdEdgeError(f"TensorRT for RTX {trt.__version__} cannot build the engine: {reason}.")
    return Engine(bytes(plan), "\n".join(logger.lines))


def _import_tensorrt_rtx() -> Any:
    try:
        return importlib.import_module("tensorrt_rtx_bindings")
    except ImportError as error:
        raise MissingExtraError("tensorrt-rtx-cu13-bindings", extra="rtx", purpose="Building an engine") from error


def _profile(builder: Any, input_tensor: Any) -> Any:
    profile = builder.create_optimization_profile()
    shape = tuple(input_tensor.shape)[1:]
    profile.set_shape(input_tensor.name, (1, *shape), (1, *shape), (MAX_BATCH, *shape))
    return profile


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the builder's messages: only the log lists layers and their types."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append(message)
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def _first_reason(reasons: Sequence[Any]) -> str:
    return first_line(reasons[0]) if reasons else "no reason was given"


_KERNEL = re.compile(
    r"^Name: (?P<name>[^,]*), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: "
    r".*?Metadata: (?P<nodes>.*)$",
    re.MULTILINE,
)
_PRODUCTS = ("correlation", "gemm")


@dataclass(frozen=True)
class Kernel:
    """One step of an engine.

    Attributes:
        inputs: types of its inputs, such as `Int8`.
        nodes: names of the ONNX nodes that it computes.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    nodes: tuple[str, ...]


def parse_kernels(log: str) -> list[Kernel]:
    """Return the kernels that a builder's verbose log lists, in their order."""
    kernels = [
        Kernel(
            match["name"],
            match["kind"],
            tuple(re.findall(r"Datatype: (\w+)", match["inputs"])),
            tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", match["nodes"])),
        )
        for match in _KERNEL.finditer(log)
    ]
    if not kernels:
        raise ClipRdEdgeError("The builder's log lists no layers; expected its verbose log with detailed profiling.")
    return kernels


def mistyped_layers(log: str, types: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the layers that an engine does not compute in the expected type.

    Args:
        log: the builder's.
        types: expected type per layer name, as TensorRT calls it: `Int8`, `Half`.

    Returns:
        Per layer name, the types that its kernel reads instead; an empty tuple if no kernel names the layer.
    """
    kernels_by_layer: dict[str, list[Kernel]] = {}
    for kernel in parse_kernels(log):
        for name in kernel.nodes:
            kernels_by_layer.setdefault(name, []).append(kernel)
    input_types = {name: _input_types(kernels_by_layer.get(name, ())) for name in types}
    return {name: actual for name, actual in input_types.items() if types[name] not in actual}


def _input_types(kernels: Sequence[Kernel]) -> tuple[str, ...]:
    """Return the type that a node's own product kernels read first, or else all types that its fused kernels read.

    An INT8 node also appears in the kernels that quantise its input or add its bias. A product that was fused with its
    neighbours has no kernel of its own; its types are among those of the fused kernel.
    """
    products = [kernel.inputs[0] for kernel in kernels if kernel.kind in _PRODUCTS and kernel.inputs]
    return tuple(products or (dtype for kernel in kernels for dtype in kernel.inputs))
