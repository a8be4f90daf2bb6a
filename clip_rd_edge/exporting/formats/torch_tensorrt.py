"""Build TensorRT engines with torch-tensorrt: directly from PyTorch, for the GPU of this machine.

This is the alternative to building from ONNX (`formats.tensorrt`), for a tower that TensorRT's ONNX parser does not
support. torch-tensorrt builds only for the GPU of this machine, and comes in two packages: `torch-tensorrt` for
TensorRT, `torch-tensorrt-rtx` for TensorRT for RTX. Its networks are strongly typed, too: an engine computes in the
types of the module it is built from.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clip_rd_edge.errors import ClipRdEdgeError, UsageError, needs_extra
from clip_rd_edge.exporting.formats.onnx import MIN_AGREEMENT
from clip_rd_edge.exporting.formats.tensorrt import MAX_BATCH, EngineBuilder, TypedTower
from clip_rd_edge.exporting.graph import silently
from clip_rd_edge.exporting.parity import Inputs, agreement
from clip_rd_edge.exporting.plan import RTX_TARGETS
from clip_rd_edge.exporting.towers import NO_FAST_PATH, TOWERS, converting
from clip_rd_edge.models.clip import ClipModel, evaluation_mode

_CAPABILITIES = {**{name: name for name in RTX_TARGETS}, "jetson-orin": "sm87", "jetson-thor": "sm110"}
_EXAMPLE_BATCH = 2  # a batch size of 1 would be treated as a constant
_GPU = torch.device("cuda")
_HINT = "omit {via}: engines are then built from ONNX, without a GPU"


class _Fp16Tower(nn.Module):
    """A tower in float16, except for the norm of its embeddings; like the tower, it takes float32 pixels."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower.half()

    def forward(self, inputs: Tensor) -> Tensor:
        embeddings: Tensor = self.tower(inputs.half() if inputs.is_floating_point() else inputs)
        return embeddings


def engine_builder(torch_tensorrt: Any, clip: ClipModel, inputs: Mapping[str, Inputs]) -> EngineBuilder:
    """Return a function that builds a model's engines on this machine's GPU."""

    def build(name: str, typed: TypedTower) -> bytes:
        tower, batch = copy.deepcopy(TOWERS[name](clip.model)).to(_GPU), torch.from_numpy(inputs[name]).to(_GPU)
        with evaluation_mode(tower), NO_FAST_PATH, silently(), torch.no_grad():
            if typed.precision == "fp16":
                tower = _to_fp16(tower, name, batch)
            example = batch[:_EXAMPLE_BATCH]
            with converting("torch-tensorrt", name, clip, hint=_HINT):
                return _build_engine(torch_tensorrt, tower, example)

    return build


def require_torch_tensorrt(target: str) -> Any:
    """Return the package if it builds for `target`, one of `exporting.plan.TARGETS`, on this machine."""
    with needs_extra("torch-tensorrt", extra="torch-tensorrt", purpose="{via} torch-tensorrt"):
        module = importlib.import_module("torch_tensorrt")
    names, rtx = ("torch-tensorrt", "torch-tensorrt-rtx"), target in RTX_TARGETS
    has_rtx = bool(getattr(module.ENABLED_FEATURES, "tensorrt_rtx", False))
    capability = "sm{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "none for torch"
    if not torch.cuda.is_available() or capability != _CAPABILITIES.get(target, capability) or has_rtx != rtx:
        raise UsageError(
            f"{names[has_rtx]} does not build for {target} here: torch-tensorrt builds for this machine's GPU, "
            f"{capability}, alone, and for RTX cards by torch-tensorrt-rtx.",
            hint=_HINT if has_rtx == rtx else f"pip install {names[rtx]} instead",
        )
    return module


def _to_fp16(tower: nn.Module, name: str, batch: Tensor) -> nn.Module:
    fp16 = _Fp16Tower(copy.deepcopy(tower))
    reference, embeddings = (np.asarray(module(batch).cpu()) for module in (tower, fp16))
    cosine = agreement(reference, embeddings).centred_cosine
    if cosine < MIN_AGREEMENT:
        raise ClipRdEdgeError(
            f"torch-tensorrt cannot build the {name} tower in float16: its centred cosine with float32 is {cosine:.4f} "
            f"on extreme images and texts, below {MIN_AGREEMENT}.",
            hint="use {precision} fp32, or omit {via}: from ONNX, the layers that overflow stay in float32",
        )
    return fp16


def _build_engine(torch_tensorrt: Any, tower: nn.Module, example: Tensor) -> bytes:
    """Return the content of an engine for batches of 1 to MAX_BATCH, tuned for 1."""
    shape = tuple(example.shape[1:])
    program = torch.export.export(
        tower, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
    )
    spec = torch_tensorrt.Input(
        min_shape=(1, *shape), opt_shape=(1, *shape), max_shape=(MAX_BATCH, *shape), dtype=example.dtype
    )
    convert = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine
    return bytes(convert(program, arg_inputs=[spec]))
