"""TensorRT engines by torch-tensorrt: straight from PyTorch, for the GPU of this machine.

The second way beside ONNX (`tensorrt.py`), for a tower that TensorRT's ONNX parser does not take. torch-tensorrt builds
for the GPU that it finds alone, and comes in two packages: `torch-tensorrt` for TensorRT, `torch-tensorrt-rtx` for
TensorRT for RTX. Its networks are strongly typed, too: an engine computes in the types of the module that it is given.
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clip_rd_edge.contract.bundle import read_manifest
from clip_rd_edge.convert.fp16 import MIN_AGREEMENT, probes_of
from clip_rd_edge.convert.graph import silently
from clip_rd_edge.convert.parity import Inputs, agreement
from clip_rd_edge.convert.targets import RTX_TARGETS
from clip_rd_edge.convert.tensorrt.bundle import EngineBuilder
from clip_rd_edge.convert.tensorrt.strongly_typed import TypedTower
from clip_rd_edge.errors import ClipRdEdgeError, MissingExtraError, UsageError
from clip_rd_edge.exporters.onnx import evaluating, reason, without_fast_path
from clip_rd_edge.models.clip import ClipModel, ImageTower, TextTower

_TOWERS = {"image": ImageTower, "text": TextTower}
_CAPABILITIES = {**{name: name for name in RTX_TARGETS}, "jetson-orin": "sm87", "jetson-thor": "sm110"}
_EXAMPLES = 2  # a batch of 1 would be taken for a constant
_ELSE = "leave --via away: engines are built from ONNX then, without a GPU"


class _Half(nn.Module):
    """A tower in float16, but for the norm of its embeddings; it takes float32 as the tower does."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower.half()

    def forward(self, values: Tensor) -> Tensor:
        embeddings: Tensor = self.tower(values.half() if values.is_floating_point() else values)
        return embeddings


def engine_builder(torch_tensorrt: Any, clip: ClipModel, source: Path) -> EngineBuilder:
    """What builds the engines of a model on this machine's GPU.

    Args:
        torch_tensorrt: the package, as `require_torch_tensorrt` gives it.
        source: the model's float32 bundle, whose tokenizer makes what float16 is tried on.
    """
    probes = probes_of(source, read_manifest(source))

    def build(name: str, typed: TypedTower) -> bytes:
        tower = copy.deepcopy(_TOWERS[name](clip.model)).to(_device())
        with evaluating(tower), without_fast_path(), silently(), torch.no_grad():
            if typed.precision == "fp16":
                tower = _half(tower, name, probes[name])
            return _built(torch_tensorrt, tower, name, torch.from_numpy(probes[name][:_EXAMPLES]).to(_device()))

    return build


def require_torch_tensorrt(target: str) -> Any:
    """The package, where it builds for `target`, one of `tensorrt.TARGETS`, on this machine.

    Raises:
        UsageError: there is no GPU, or what is installed does not build for `target` on it.
        MissingExtraError: torch-tensorrt is not installed.
        ClipRdEdgeError: torch-tensorrt does not load.
    """
    if not torch.cuda.is_available():
        raise UsageError(
            f"--via torch-tensorrt needs a CUDA build of torch and its GPU; torch {torch.__version__} sees none.",
            hint=_ELSE,
        )
    here = "sm{}{}".format(*torch.cuda.get_device_capability())
    if here != _CAPABILITIES.get(target, here):
        raise UsageError(f"torch-tensorrt builds for the GPU that is here, {here}, and not for {target}.", hint=_ELSE)
    try:
        module = importlib.import_module("torch_tensorrt")
    except ImportError as error:
        raise MissingExtraError("torch-tensorrt", extra="torch-tensorrt", purpose="--via torch-tensorrt") from error
    except Exception as error:  # it asks for devices and loads libraries, whose errors are of all kinds
        raise ClipRdEdgeError(f"torch-tensorrt does not load: {reason(error)}.", hint=_ELSE) from error
    rtx = bool(getattr(module.ENABLED_FEATURES, "tensorrt_rtx", False))
    if rtx != (target in RTX_TARGETS):
        names = ("torch-tensorrt-rtx", "torch-tensorrt")
        raise UsageError(
            f"{names[not rtx]} does not build for {target}.", hint=f"pip install {names[rtx]} in its place"
        )
    return module


def _device() -> torch.device:
    return torch.device("cuda")


def _half(tower: nn.Module, name: str, probes: Inputs) -> nn.Module:
    """The tower in float16.

    Raises:
        ClipRdEdgeError: values overflow: ONNX keeps the layers that they do in in float32, here all are in float16.
    """
    half = _Half(copy.deepcopy(tower))
    given = torch.from_numpy(probes).to(_device())
    reference, other = (np.asarray(each(given).cpu()) for each in (tower, half))
    found = agreement(reference, other).centred_cosine
    if found < MIN_AGREEMENT:
        raise ClipRdEdgeError(
            f"The {name} tower cannot be in float16 by torch-tensorrt: its centred cosine with float32 is {found:.4f} "
            f"on pictures and texts of extremes, below {MIN_AGREEMENT}.",
            hint="--precision fp32, or leave --via away: from ONNX, the layers that overflow stay in float32",
        )
    return half


def _built(torch_tensorrt: Any, tower: nn.Module, name: str, example: Tensor, *, max_batch: int = 8) -> bytes:
    """The engine's content, for batches of 1 to `max_batch`, tuned for 1."""
    rest = tuple(example.shape[1:])
    try:
        program = torch.export.export(
            tower, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=max_batch)},)
        )
        given = torch_tensorrt.Input(
            min_shape=(1, *rest), opt_shape=(1, *rest), max_shape=(max_batch, *rest), dtype=example.dtype
        )
        convert = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine
        return bytes(convert(program, arg_inputs=[given]))
    except Exception as error:  # its errors are of all kinds, and hold the whole graph
        raise ClipRdEdgeError(
            f"torch-tensorrt cannot build the engine of the {name} tower: {reason(error)}.", hint=_ELSE
        ) from error
