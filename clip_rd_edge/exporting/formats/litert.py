"""LiteRT: towers from PyTorch by litert-torch; float16 weights and INT8 by ai-edge-quantizer, chosen by measurement."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor, nn

from clip_rd_edge.bundle.manifest import Manifest, Tower
from clip_rd_edge.exporting.formats import Converted, Format, Job
from clip_rd_edge.exporting.formats.onnx import MIN_AGREEMENT, float32_note
from clip_rd_edge.exporting.graph import silently
from clip_rd_edge.exporting.int8.candidates import ONE_INPUT, Backend, Candidate, Float32Tower
from clip_rd_edge.exporting.int8.search import write_int8
from clip_rd_edge.exporting.parity import Inputs, measure
from clip_rd_edge.exporting.towers import (
    TOWERS,
    Toolchain,
    converting,
    example_row,
    from_own_float32,
    on_cpu,
    write_towers,
)
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.one_input import LiteRtEncoder, open_litert
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.process import WITHOUT_PROGRESS_BARS

LITERT = "litert"
# Operators are quantised by the names of their outputs, which begin with the modules that they come from. Those of the
# tower's own module compute the final norm, which stays in float32.
_INSIDE = "Tower_tower/"
_CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")
_PRODUCTS = ("FULLY_CONNECTED",)
# Operators between convolutions; in float32, each would need its inputs dequantised and its output quantised again.
_BETWEEN = (
    "ADD", "MUL", "PAD", "PADV2", "AVERAGE_POOL_2D", "MAX_POOL_2D", "RELU", "HARD_SWISH", "LOGISTIC", "MEAN",
    "CONCATENATION",
)  # fmt: skip
_CALIBRATION_SAMPLES = 64  # ranges are those of minimum and maximum, each sample runs with every value kept

Recipe = list[dict[str, Any]]


class LiteRt(Format):
    """LiteRT files, converted from PyTorch; float16 and INT8 are made from LiteRT's own float32."""

    packages, extra = ("litert-torch", "ai-edge-quantizer", "ai-edge-litert"), "litert-torch"

    def convert(self, job: Job) -> Converted:
        if job.plan.precision == "fp32":
            return write_towers(job, LITERT_TOOLS)
        with from_own_float32(job, LITERT_TOOLS) as own:
            if job.plan.precision == "int8":
                return write_int8(own, LITERT_BACKEND)
            return own.convert_towers(partial(write_fp16, own), doing="float16 weights")

    def reference(self, folder: Path, manifest: Manifest) -> LiteRtEncoder:
        """Return an encoder without XNNPACK, whose kernels differ by processor."""
        encoder = LiteRtEncoder(folder, manifest)
        encoder.xnnpack = False
        return encoder


class _NamedTower(nn.Module):
    """A tower whose output has a name; its operators are found by the names of this class and of the attribute."""

    def __init__(self, tower: nn.Module, output: str) -> None:
        super().__init__()
        self.tower, self.output = tower, output

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        (rows,) = inputs.values()
        return {self.output: self.tower(rows)}


def convert_tower(clip: ClipModel, name: str, tower: Tower, inputs: Inputs) -> bytes:
    """Return the content of a LiteRT file of the tower `name`, for one input like those of `inputs`.

    Args:
        tower: its ONNX file's entry, whose names of input and output are kept.
        inputs: (N, 3, H, W) float32 or (N, T) int64; LiteRT's file takes int32 ids.
    """
    with silently():  # it logs which of its optional parts are missing
        import litert_torch
        from litert_torch import progress

    module = _NamedTower(TOWERS[name](clip.model), tower.output_name)
    progress.console.quiet = True
    with converting("litert-torch", name, clip), on_cpu(module):
        model = litert_torch.convert(module, sample_kwargs={tower.input_name: example_row(inputs)})
        return bytes(model.model_content())


def write_fp16(job: Job, name: str, tower: Tower) -> Tower:
    """Write one tower with float16 weights, which a CPU computes in float32, a phone's GPU or NPU in float16."""
    file = job.source / tower.file
    content = quantize(file.read_bytes(), fp16_recipe())
    reference, session = (open_litert(model, threads=job.plan.threads) for model in (str(file), content))
    measured = measure(session, reference, job.inputs[name], threads=job.plan.threads)
    if measured.centred_cosine < MIN_AGREEMENT:
        shutil.copyfile(file, job.folder / tower.file)
        return msgspec.structs.replace(tower, note=float32_note(measured.centred_cosine))
    write_bytes(job.folder / tower.file, content)
    return msgspec.structs.replace(tower, precision="fp16", measured=measured)


def litert_candidates(tower: Float32Tower) -> Iterator[Candidate]:
    """Yield INT8 candidates for a float32 LiteRT file.

    A tower with several convolutions is quantised statically: whole, or in its convolutions and what is between them,
    because some operators have no kernel in INT8 and others lose too much. Any tower is quantised dynamically, and in
    its weights alone, which saves space.
    """
    content = tower.model.read_bytes()
    make = partial(partial, quantize, content)
    operators = operator_names(content)
    if sum(operators.count(name) for name in _CONVOLUTIONS) > 1:
        tower.reporter.update("measuring the ranges of INT8")
        ranges = calibrated(content, tower.calibrate, threads=tower.plan.threads)
        inner = (*_CONVOLUTIONS, *_BETWEEN)
        for name, of_operators in {
            "static": _static(("*",)),
            "static in convolutions and products": _static((*inner, *_PRODUCTS)),
            "static in convolutions": _static(inner),
            "static in convolutions alone": _static(_CONVOLUTIONS),
            "static in convolutions, dynamic in products": _static(inner) + _dynamic(_PRODUCTS),
        }.items():
            yield Candidate(name, make(of_operators, ranges))
    yield Candidate("dynamic", make(_dynamic(("*",))))
    yield Candidate("weights only", make(recipe("weight_only", ("*",), num_bits=8)))


def quantize(content: bytes, steps: Recipe, ranges: dict[str, Any] | None = None) -> bytes:
    """Return a float32 LiteRT file quantised by a recipe of ai-edge-quantizer; static ones need `ranges`."""
    quantizer = _quantizer(content, steps)
    with silently(), WITHOUT_PROGRESS_BARS:
        result = quantizer.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)


def calibrated(content: bytes, samples: Inputs, *, threads: int) -> dict[str, Any]:
    """Return the range of every activation of a float32 LiteRT file on some inputs (N, …)."""
    from ai_edge_litert.interpreter import Interpreter

    (name,) = (port.name for port in open_litert(content, threads=threads).get_inputs())
    (signature,) = Interpreter(model_content=content).get_signature_list()
    data = [{name: sample[None]} for sample in samples[:_CALIBRATION_SAMPLES]]
    with silently(), WITHOUT_PROGRESS_BARS:
        quantizer = _quantizer(content, _static(("*",)))
        ranges: dict[str, Any] = quantizer.calibrate({str(signature): data}, num_threads=threads)
    return ranges


def operator_names(content: bytes) -> list[str]:
    """Return the names of a file's operators in their order."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES  # XNNPACK would hide those that it runs
    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=kernels)
    return [str(operator["op_name"]) for operator in interpreter._get_ops_details()]


def _quantizer(content: bytes, steps: Recipe) -> Any:
    from ai_edge_quantizer.quantizer import Quantizer

    return Quantizer(bytearray(content), steps)


def recipe(kind: str, operators: tuple[str, ...], **settings: Any) -> Recipe:
    """Return a recipe for these operators.

    Args:
        kind: `static` for weights and activations in INT8, by measured ranges; `dynamic` for activations that are
            quantised as they come; `weight_only` for weights that are stored in fewer bits.
    """
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.recipe_manager import RecipeManager

    manager = RecipeManager()
    for name in operators:
        getattr(manager, f"add_{kind}_config")(_INSIDE, TFLOperationName(name), **settings)
    result: Recipe = manager.get_quantization_recipe()
    return result


_static = partial(recipe, "static", activation_num_bits=8, weight_num_bits=8)
_dynamic = partial(recipe, "dynamic", num_bits=8)


def fp16_recipe() -> Recipe:
    """Return a recipe for weights that are stored in float16."""
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    operators = ("FULLY_CONNECTED", *_CONVOLUTIONS, "CONV_2D_TRANSPOSE", "EMBEDDING_LOOKUP")
    return recipe("weight_only", operators, num_bits=16, algorithm_key=AlgorithmName.FLOAT_CASTING)


LITERT_TOOLS = Toolchain("LiteRT", LITERT, ".tflite", convert_tower, open_litert)
LITERT_BACKEND = Backend(LITERT, open_litert, litert_candidates, write_fp16=write_fp16, **ONE_INPUT)
