"""LiteRT: towers from PyTorch by litert-torch; float16 weights and INT8 by ai-edge-quantizer, chosen by measurement."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from clip_rd_edge.bundle.manifest import Manifest, Tower
from clip_rd_edge.errors import ClipRdEdgeError, MissingExtraError
from clip_rd_edge.exporting.conversion import start_conversion
from clip_rd_edge.exporting.formats.onnx import MIN_AGREEMENT, float32_note
from clip_rd_edge.exporting.graph import silently
from clip_rd_edge.exporting.int8.candidates import Candidate, CandidateRequest, one_input_backend
from clip_rd_edge.exporting.parity import Inputs, hard_inputs, measure
from clip_rd_edge.exporting.plan import ExportRequest
from clip_rd_edge.exporting.towers import OTHER_FORMAT, TOWERS, Toolchain, on_cpu, root_cause
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.litert import open_litert
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.process import without_progress_bars
from clip_rd_edge.utils.reporting import SILENT, Reporter

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


def write_litert_fp16(source: Path, folder: Path, request: ExportRequest, *, reporter: Reporter = SILENT) -> Manifest:
    """Write the towers of the float32 LiteRT bundle `source` with float16 weights; return their manifest, not written.

    A CPU computes them in float32; a phone's GPU or NPU in float16.
    """
    manifest = start_conversion(source, folder, request)
    inputs = hard_inputs(source, manifest)
    towers = {}
    for name, tower in manifest.towers.items():
        reporter.update(f"{name} tower: float16 weights")
        towers[name] = write_litert_fp16_tower(source, folder, tower, inputs[name], threads=request.threads)
    return manifest.with_towers(towers)


def write_litert_fp16_tower(source: Path, folder: Path, tower: Tower, inputs: Inputs, *, threads: int) -> Tower:
    """Write one tower of the float32 LiteRT bundle `source` with float16 weights; return its manifest entry."""
    file = source / tower.file
    content = quantize(file.read_bytes(), fp16_recipe())
    reference, session = (open_litert(model, threads=threads) for model in (str(file), content))
    measured = measure(session, reference, inputs, threads=threads)
    if measured.centred_cosine < MIN_AGREEMENT:
        shutil.copyfile(file, folder / tower.file)
        return msgspec.structs.replace(tower, note=float32_note(measured.centred_cosine))
    write_bytes(folder / tower.file, content)
    return msgspec.structs.replace(tower, precision="fp16", measured=measured)


def litert_candidates(request: CandidateRequest) -> Iterator[Candidate]:
    """Yield INT8 candidates for a float32 LiteRT file.

    A tower with several convolutions is quantised statically: whole, or in its convolutions and what is between them,
    because some operators have no kernel in INT8 and others lose too much. Any tower is quantised dynamically, and in
    its weights alone, which saves space.
    """
    content = request.model.read_bytes()
    operators = operator_names(content)
    if sum(operators.count(name) for name in _CONVOLUTIONS) > 1:
        request.reporter.update("measuring the ranges of INT8")
        ranges = calibrated(content, request.samples, threads=request.threads)
        inner = (*_CONVOLUTIONS, *_BETWEEN)
        for name, recipe in {
            "static": static_recipe(("*",)),
            "static in convolutions and products": static_recipe((*inner, *_PRODUCTS)),
            "static in convolutions": static_recipe(inner),
            "static in convolutions alone": static_recipe(_CONVOLUTIONS),
            "static in convolutions, dynamic in products": static_recipe(inner) + dynamic_recipe(_PRODUCTS),
        }.items():
            yield Candidate(name, _maker(content, recipe, ranges))
    yield Candidate("dynamic", _maker(content, dynamic_recipe(("*",))))
    yield Candidate("weights only", _maker(content, weights_recipe(("*",))))


def _maker(content: bytes, recipe: Recipe, ranges: dict[str, Any] | None = None) -> Callable[[], bytes]:
    return partial(quantize, content, recipe, ranges)


def quantize(content: bytes, recipe: Recipe, ranges: dict[str, Any] | None = None) -> bytes:
    """Return a float32 LiteRT file quantised by a recipe of ai-edge-quantizer; static ones need `ranges`."""
    quantizer = _quantizer(content, recipe)
    with silently(), without_progress_bars():
        result = quantizer.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)


def calibrated(content: bytes, samples: Inputs, *, threads: int) -> dict[str, Any]:
    """Return the range of every activation of a float32 LiteRT file on some inputs (N, …)."""
    (name,) = (port.name for port in open_litert(content, threads=threads).get_inputs())
    data = [{name: sample[None]} for sample in samples[:_CALIBRATION_SAMPLES]]
    with silently(), without_progress_bars():
        quantizer = _quantizer(content, static_recipe(("*",)))
        ranges: dict[str, Any] = quantizer.calibrate({_signature(content): data}, num_threads=threads)
    return ranges


def operator_names(content: bytes) -> list[str]:
    """Return the names of a file's operators in their order."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES  # XNNPACK would hide those that it runs
    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=kernels)
    return [str(operator["op_name"]) for operator in interpreter._get_ops_details()]


def _signature(content: bytes) -> str:
    from ai_edge_litert.interpreter import Interpreter

    (signature,) = Interpreter(model_content=content).get_signature_list()
    return str(signature)


def _quantizer(content: bytes, recipe: Recipe) -> Any:
    from ai_edge_quantizer.quantizer import Quantizer

    return Quantizer(bytearray(content), recipe)


def static_recipe(operators: tuple[str, ...]) -> Recipe:
    """Return a recipe for weights and activations in INT8, by measured ranges, of these operators."""
    return _recipe(
        lambda manager, name: manager.add_static_config(_INSIDE, name, activation_num_bits=8, weight_num_bits=8),
        operators,
    )


def dynamic_recipe(operators: tuple[str, ...]) -> Recipe:
    """Return a recipe for weights in INT8, and activations that are quantised as they come, of these operators."""
    return _recipe(lambda manager, name: manager.add_dynamic_config(_INSIDE, name, num_bits=8), operators)


def weights_recipe(operators: tuple[str, ...]) -> Recipe:
    """Return a recipe for weights that are stored in INT8 and multiplied in float32."""
    return _recipe(lambda manager, name: manager.add_weight_only_config(_INSIDE, name, num_bits=8), operators)


def fp16_recipe() -> Recipe:
    """Return a recipe for weights that are stored in float16."""
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    def add(manager: Any, name: Any) -> None:
        manager.add_weight_only_config(_INSIDE, name, num_bits=16, algorithm_key=AlgorithmName.FLOAT_CASTING)

    return _recipe(add, ("FULLY_CONNECTED", *_CONVOLUTIONS, "CONV_2D_TRANSPOSE", "EMBEDDING_LOOKUP"))


def _recipe(add: Callable[[Any, Any], object], operators: tuple[str, ...]) -> Recipe:
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.recipe_manager import RecipeManager

    manager = RecipeManager()
    for name in operators:
        add(manager, TFLOperationName(name))
    recipe: Recipe = manager.get_quantization_recipe()
    return recipe


LITERT_BACKEND = one_input_backend(LITERT, open_litert, litert_candidates, write_fp16=write_litert_fp16_tower)


class _NamedTower(nn.Module):
    """A tower whose output has a name; `formats.litert` finds its operators by the name of the attribute `tower`."""

    def __init__(self, tower: nn.Module, output: str) -> None:
        super().__init__()
        self.tower, self.output = tower, output

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        (rows,) = inputs.values()
        return {self.output: self.tower(rows)}


def require_litert_torch() -> None:
    """Raise MissingExtraError if litert-torch or what it needs here is not installed."""
    packages = {"litert_torch": "litert-torch", "ai_edge_quantizer": "ai-edge-quantizer"}
    for module, package in {**packages, "ai_edge_litert": "ai-edge-litert"}.items():
        if find_spec(module) is None:
            raise MissingExtraError(package, extra="litert-torch", purpose="Exporting for LiteRT")


def convert_tower(clip: ClipModel, name: str, tower: Tower, inputs: Inputs) -> bytes:
    """Return the content of a LiteRT file of the tower `name`, for one input like those of `inputs`.

    Args:
        tower: its ONNX file's entry, whose names of input and output are kept.
        inputs: (N, 3, H, W) float32 or (N, T) int64; LiteRT's file takes int32 ids.
    """
    with silently():  # it logs which of its optional parts are missing
        import litert_torch
        from litert_torch import progress

    example = torch.from_numpy(inputs[:1])
    if not example.is_floating_point():
        example = example.to(torch.int32)
    module = _NamedTower(TOWERS[name](clip.model), tower.output_name)
    progress.console.quiet = True
    try:
        with on_cpu(module):
            model = litert_torch.convert(module, sample_kwargs={tower.input_name: example})
            return bytes(model.model_content())
    except Exception as error:  # it raises many types, with the whole graph in their messages
        raise ClipRdEdgeError(
            f"litert-torch cannot convert the {name} tower of {clip.name}: {root_cause(error)}.", hint=OTHER_FORMAT
        ) from error


LITERT_TOOLS = Toolchain("LiteRT", LITERT, ".tflite", convert_tower, open_litert)
