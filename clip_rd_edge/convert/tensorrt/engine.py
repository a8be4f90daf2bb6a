"""TensorRT engines from ONNX, built by TensorRT for RTX; TensorRT proper builds where the GPU is (`self_build.py`).

Networks are strongly typed: every type stands in the ONNX (`fp16.py`, `symmetric.py`), since TensorRT 11 has neither
precision flags nor calibrators, and 10 and TensorRT for RTX do without them, too. Never imports torch.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_rd_edge.errors import ClipRdEdgeError, MissingExtraError


@dataclass(frozen=True)
class Engine:
    """An engine as its file's content, and what the builder's log says of its layers (see `engine_layers`)."""

    content: bytes
    log: str


def build_engine(
    model: bytes,
    *,
    target: str,
    max_batch: int = 8,
) -> Engine:
    """Build an engine for batches of 1 to `max_batch`, tuned for 1.

    Args:
        model: a strongly typed ONNX file's content with one input, whose first dimension is the batch.
        target: one of RTX_TARGETS.

    Raises:
        MissingExtraError: TensorRT for RTX is not installed.
        ClipRdEdgeError: the parser does not take the ONNX, or the builder fails.
    """
    trt = _import()
    logger = _logger(trt)
    builder = trt.Builder(logger)
    # From version 11 on there is no other kind of network, and no flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        reasons = [parser.get_error(i) for i in range(parser.num_errors)]
        raise ClipRdEdgeError(
            f"TensorRT for RTX {trt.__version__} does not take the ONNX: {_first(reasons)}.",
            hint="export another precision, or another architecture",
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    config.add_optimization_profile(_profile(builder, network.get_input(0), max_batch))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ClipRdEdgeError(f"TensorRT for RTX {trt.__version__} cannot build the engine: {_first(logger.errors)}.")
    return Engine(bytes(plan), "\n".join(logger.lines))


def _import() -> Any:
    try:
        return importlib.import_module("tensorrt_rtx_bindings")
    except ImportError as error:
        raise MissingExtraError("tensorrt-rtx-cu13-bindings", extra="rtx", purpose="Building an engine") from error


def _profile(builder: Any, given: Any, max_batch: int) -> Any:
    profile = builder.create_optimization_profile()
    rest = tuple(given.shape)[1:]
    profile.set_shape(given.name, (1, *rest), (1, *rest), (max_batch, *rest))
    return profile


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what the builder says: layers and their types are told in the log alone."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append(message)
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def _first(reasons: Sequence[Any]) -> str:
    lines = str(reasons[0]).splitlines() if reasons else []
    return lines[0].rstrip(".") if lines else "it gives no reason"


_KERNEL = re.compile(
    r"^Name: (?P<name>[^,]*), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: "
    r".*?Metadata: (?P<nodes>.*)$",
    re.MULTILINE,
)
_PRODUCTS = ("correlation", "gemm")


@dataclass(frozen=True)
class Kernel:
    """One step of an engine: the ONNX nodes that it computes, and the types of what it reads, such as `Int8`."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    nodes: tuple[str, ...]


def kernels(log: str) -> list[Kernel]:
    """The kernels that a builder's verbose log tells of, in their order.

    Raises:
        ClipRdEdgeError: the log tells of none.
    """
    found = [
        Kernel(
            match["name"],
            match["kind"],
            tuple(re.findall(r"Datatype: (\w+)", match["inputs"])),
            tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", match["nodes"])),
        )
        for match in _KERNEL.finditer(log)
    ]
    if not found:
        raise ClipRdEdgeError("The builder's log names no layers; expected its verbose log with detailed profiling.")
    return found


def layers_not_in(log: str, types: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The layers of a model that an engine does not compute in the type that they should have.

    Args:
        log: of the build.
        types: by the layer's name its type as TensorRT calls it: `Int8`, `Half`.

    Returns:
        By the layer's name the types that its kernel reads instead; none where no kernel names the layer.
    """
    computing: dict[str, list[Kernel]] = {}
    for kernel in kernels(log):
        for name in kernel.nodes:
            computing.setdefault(name, []).append(kernel)
    found = {name: _reads(computing.get(name, ())) for name in types}
    return {name: read for name, read in found.items() if types[name] not in read}


def _reads(steps: Sequence[Kernel]) -> tuple[str, ...]:
    """The types that the product among a node's kernels reads first, else all that its fused kernels read.

    A node of INT8 also appears in the kernels that quantise its input, or add its bias; a product that was fused with
    its neighbours has no kernel of its own, and its types are among those of the fused one.
    """
    products = [kernel.inputs[0] for kernel in steps if kernel.kind in _PRODUCTS and kernel.inputs]
    return tuple(products or (read for kernel in steps for read in kernel.inputs))
