"""TensorRT engines from ONNX, built by TensorRT for RTX; TensorRT proper builds where the GPU is (`self_build.py`).

Networks are strongly typed: every type stands in the ONNX (`fp16.py`, `symmetric.py`), since TensorRT 11 has neither
precision flags nor calibrators, and 10 and TensorRT for RTX do without them, too. Never imports torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clip_rd_edge.errors import ClipRdEdgeError, InputError, MissingExtraError, near_matches

# Compute capabilities that TensorRT for RTX builds for on any machine.
RTX_TARGETS = {
    "sm75": "GeForce RTX 20, T4",
    "sm80": "A100",
    "sm86": "GeForce RTX 30, A10, RTX A",
    "sm89": "GeForce RTX 40, L4, RTX Ada",
    "sm120": "GeForce RTX 50, RTX PRO Blackwell",
    "sm121": "GB10 (DGX Spark)",
}
# Devices that build their engines themselves, and what they need for it.
SELF_BUILDING_TARGETS = {
    "nvidia-gpu": "NVIDIA GPU with TensorRT 10 or 11",
    "jetson-orin": "Jetson Orin, compute capability 8.7; JetPack 6, TensorRT 10",
    "jetson-thor": "Jetson Thor, compute capability 11.0; JetPack 7, TensorRT 10.13",
}
TARGETS = {**RTX_TARGETS, **SELF_BUILDING_TARGETS}


@dataclass(frozen=True)
class Engine:
    """An engine as its file's content, and what the builder's log says of its layers (see `engine_layers`)."""

    content: bytes
    log: str


def require_target(name: str | None) -> str:
    """`name` where an engine, or what builds one, can be made for it.

    Raises:
        InputError: it cannot.
    """
    if name in TARGETS:
        return str(name)
    known = ", ".join(f"{target} ({meant.partition(';')[0]})" for target, meant in TARGETS.items())
    problem = "An engine needs a target" if name is None else f"There is no engine for {name!r}"
    raise InputError(
        f"{problem}; there are {known}.{near_matches(name or '', TARGETS)}", hint="name one: --target sm86"
    )


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
