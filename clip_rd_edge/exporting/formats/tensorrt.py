"""TensorRT: strongly typed ONNX, and engines from it, or the files that build them on the device. No torch.

The ONNX sets every type (`formats.onnx`, `int8.methods`), because TensorRT 11 has neither precision flags nor
calibrators, and TensorRT 10 and TensorRT for RTX do not need them. In INT8, as many layers are quantised as the
agreement with float32 allows.
"""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import onnx

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.manifest import ENGINE_SUFFIX, STAMP_SUFFIX, TOKENIZER, Manifest, Tower
from clip_rd_edge.errors import ClipRdEdgeError, first_line, needs_extra
from clip_rd_edge.exporting.formats import Converted, Format, Job
from clip_rd_edge.exporting.formats.onnx import float32_note, fp16_tower, nodes_out_of_range, to_fp16
from clip_rd_edge.exporting.graph import LAYERS, prepare_for_quantization, weighted_layers
from clip_rd_edge.exporting.int8.candidates import SENSITIVITY_SAMPLES, Float32Tower, int8_error, robust_layers
from clip_rd_edge.exporting.int8.methods import measure_ranges
from clip_rd_edge.exporting.int8.rounding import RoundedLayers
from clip_rd_edge.exporting.int8.saturation import right_session
from clip_rd_edge.exporting.int8.symmetric import MAX_LEVEL, quantize_symmetrically, quantized_inputs
from clip_rd_edge.exporting.parity import Inputs, agreement, embed
from clip_rd_edge.exporting.plan import BUILD_SHELL, RTX_TARGETS, SELF_BUILDING_TARGETS, Plan
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.files import sha256_of, write_bytes, write_text
from clip_rd_edge.utils.text import one_line, printable

# Returns the content of a tower's engine, given `image` or `text` and the tower's strongly typed ONNX.
EngineBuilder = Callable[[str, "TypedTower"], bytes]


class TensorRt(Format):
    """ONNX with engines beside it, built from it or by torch-tensorrt.

    Some devices build their engines themselves: for them, the folder holds build files instead (`write_build_files`).
    Engines for an RTX card are built without a GPU, so their latency is not measured here; the types that their layers
    compute in are checked in the builder's log.
    """

    def check(self, plan: Plan) -> None:
        """Raise if engines cannot be built for the target as planned."""
        if plan.via == "torch-tensorrt":
            from clip_rd_edge.exporting.formats.torch_tensorrt import require_torch_tensorrt

            require_torch_tensorrt(plan.target)

    def convert(self, job: Job) -> Converted:
        target, build = job.plan.target, _builder(job)

        def convert(name: str, tower: Tower) -> Tower:
            model, inputs = job.source / tower.file, job.inputs[name]
            if job.plan.precision == "int8":
                typed = int8_tower(Float32Tower.of(job, name), inputs)
            elif job.plan.precision == "fp16":
                typed = _half_tower(model, inputs)
            else:
                typed = TypedTower(model.read_bytes(), "fp32")
            write_bytes(job.folder / tower.file, typed.content)
            engine = ""
            if build is not None:
                job.reporter_of(name).update(f"building the engine for {target}")
                engine = Path(tower.file).with_suffix(ENGINE_SUFFIX).name
                write_bytes(job.folder / engine, build(name, typed))
            return msgspec.structs.replace(
                tower, precision=typed.precision, note=typed.note, engine=engine, measured=None
            )

        runtime = "tensorrt-rtx" if target in RTX_TARGETS else "tensorrt"
        converted = job.convert_towers(convert, doing=job.plan.precision, target=f"{runtime} {target}")
        if build is None:
            write_build_files(job.folder, converted.manifest, title=SELF_BUILDING_TARGETS[target])
        return converted


def _builder(job: Job) -> EngineBuilder | None:
    """Return what builds the engines, or None if the target does."""
    target = job.plan.target
    if job.plan.via == "torch-tensorrt":
        from clip_rd_edge.exporting.formats.torch_tensorrt import engine_builder, require_torch_tensorrt

        return engine_builder(require_torch_tensorrt(target), job.clip, job.inputs)
    return (lambda name, typed: _build_from_onnx(name, typed, target)) if target in RTX_TARGETS else None


def _build_from_onnx(name: str, typed: TypedTower, target: str) -> bytes:
    engine, types = build_engine(typed.content, target=target), layer_types(typed.content)
    if mistyped := mistyped_layers(engine.log, types):
        raise ClipRdEdgeError(
            f"The engine of the {name} tower computes {len(mistyped)} of {len(types)} layers in another type than its "
            f"ONNX file: {mistyped[0]} not in {types[mistyped[0]]}.",
            hint="please report it with the version of tensorrt-rtx-cu13-bindings; {precision} fp16 may work",
        )
    return engine.content


BUILD_PYTHON, CHECKSUMS = "build.py", "SHA256SUMS"


def write_build_files(folder: Path, manifest: Manifest, *, title: str) -> None:
    """Write the scripts that build the engines into a bundle's folder, which already holds the ONNX files."""
    shapes = {"image": (3, *manifest.preprocessing.size), "text": (manifest.tokenizer.context_length,)}
    towers = [(Path(tower.file).stem, tower.input_name, shapes[name]) for name, tower in manifest.towers.items()]
    calls = "\n".join(f"build {name} {input_name} {'x'.join(map(str, shape))}" for name, input_name, shape in towers)
    fields = {
        "title": title, "checksums": CHECKSUMS, "shell": BUILD_SHELL, "python": BUILD_PYTHON, "stamp": STAMP_SUFFIX,
        "max_batch": str(MAX_BATCH), "towers": repr(towers), "calls": calls,
        "name": printable(one_line(manifest.name)),  # in comments: it is a folder's name, which can be any text
    }  # fmt: skip
    for script in (BUILD_SHELL, BUILD_PYTHON):
        content = Path(__file__).with_name(f"{script}.in").read_text(encoding="utf-8")
        for key, value in fields.items():
            content = content.replace(f"@{key}@", value)
        write_text(folder / script, content)
    (folder / BUILD_SHELL).chmod(0o755)
    files = [*(tower.file for tower in manifest.towers.values()), *([TOKENIZER] if manifest.text else [])]
    write_text(folder / CHECKSUMS, "".join(f"{sha256_of(folder / name)}  {name}\n" for name in files))


class TypedTower(NamedTuple):
    """A tower's strongly typed ONNX; `precision` and `note` as in `bundle.manifest.Tower`."""

    content: bytes
    precision: str
    note: str = ""


_MEASURED = ", measured on this ONNX in ONNX Runtime, which on most CPUs computes float16 in float32."


def _half_tower(model: Path, inputs: Inputs, *, note: str = "") -> TypedTower:
    content, parity = fp16_tower(model, inputs)
    if content is None:
        return TypedTower(model.read_bytes(), "fp32", float32_note(parity.centred_cosine))
    measured = f"Its centred cosine with float32 is {parity.centred_cosine:.5f}{_MEASURED}"
    return TypedTower(content, "fp16", note or measured)


def int8_tower(tower: Float32Tower, inputs: Inputs) -> TypedTower:
    """Quantise every layer of a tower or, if that loses too much accuracy, all but those that lose most.

    What is not in INT8 is in float16, and so is the whole tower if INT8 loses too much in any way.
    """
    min_agreement = tower.plan.budget.min_agreement(tower.name)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare_for_quantization(tower.model, Path(scratch))
        model, float32 = onnx.load(prepared), open_session(str(prepared))
    out_of_range = nodes_out_of_range(model, inputs)
    all_layers = tuple(node.name for node in weighted_layers(model))
    ranges = measure_ranges(model, quantized_inputs(model), tower.calibrate)["percentile"]
    rounded = None
    if tower.plan.adapts(tower.name):
        tower.reporter.update(f"rounding the weights of {len(all_layers)} layers")
        rounded = RoundedLayers(model, tower.calibrate, max_level=MAX_LEVEL)
    subset = tower.calibrate[:SENSITIVITY_SAMPLES]
    of_held_out, of_subset = (embed(float32, samples) for samples in (tower.held_out, subset))

    def quantize(layers: Sequence[str]) -> onnx.ModelProto:
        return quantize_symmetrically(model, ranges, layers=layers, rounded=rounded)

    def embed_int8(quantized: onnx.ModelProto, samples: Inputs) -> Embeddings:
        content = quantized.SerializeToString()
        return embed(right_session(open_session(content), content), samples)

    def error_of(layers: Sequence[str]) -> float:
        return int8_error(of_subset, embed_int8(quantize(layers), subset))

    def fewer() -> Iterator[tuple[str, ...]]:
        tower.reporter.update(f"measuring the INT8 error of {len(all_layers)} layers")
        yield from filter(None, robust_layers(all_layers, error_of, max_error=1 - min_agreement))

    for layers in chain((all_layers,), fewer()):
        typed = to_fp16(quantize(layers), keep_float32=out_of_range)
        cosine = agreement(of_held_out, embed_int8(typed, tower.held_out)).centred_cosine
        if cosine >= min_agreement:
            in_float, total = len(all_layers) - len(layers), len(all_layers)
            precision = f"int8 symmetric{f', {in_float} of {total} layers in FP16' if in_float else ''}"
            note = f"Its centred cosine with float32 is {cosine:.4f}{_MEASURED}"
            return TypedTower(typed.SerializeToString(), precision, note)
    return _half_tower(tower.model, inputs, note=f"fp16: INT8 does not reach a centred cosine of {min_agreement}.")


def layer_types(content: bytes) -> dict[str, str]:
    """Return the types of the Conv, MatMul and Gemm nodes of a typed ONNX file that are not in float32, by name."""
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(content)).graph
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    halves = {v.name for v in graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    products = [node for node in graph.node if node.op_type in LAYERS]
    int8 = {node.name: "Int8" for node in products if dequantized.issuperset(node.input[:2])}
    return {node.name: "Half" for node in products if node.output[0] in halves} | int8


MAX_BATCH = 8  # of every engine, however it is built


class Engine(NamedTuple):
    """The content of an engine file, and the builder's log, which lists its kernels."""

    content: bytes
    log: str


def build_engine(model: bytes, *, target: str) -> Engine:
    """Build an engine for batches of 1 to MAX_BATCH, tuned for 1."""
    with needs_extra("tensorrt-rtx-cu13-bindings", extra="rtx", purpose="Building an engine"):
        trt = importlib.import_module("tensorrt_rtx_bindings")
    logger = _logger(trt)
    builder = trt.Builder(logger)
    # From version 11 on, every network is strongly typed, and the flag is gone.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser, content = trt.OnnxParser(network, logger), None
    if parser.parse(model):
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
        given = network.get_input(0)
        shape = tuple(given.shape)[1:]
        profile.set_shape(given.name, (1, *shape), (1, *shape), (MAX_BATCH, *shape))
        config.add_optimization_profile(profile)
        content = builder.build_serialized_network(network, config)
    if content is None:
        reasons = [*(parser.get_error(i) for i in range(parser.num_errors)), *logger.errors, "it gives no reason"]
        raise ClipRdEdgeError(
            f"TensorRT for RTX {trt.__version__} cannot build the engine: {first_line(reasons[0])}.",
            hint="export in another precision, or use another architecture",
        )
    return Engine(bytes(content), "\n".join(logger.lines))


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


_KERNEL = re.compile(
    r"^Name: [^,]*, LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: .*?Metadata: (?P<nodes>.*)$",
    re.MULTILINE,
)
_PRODUCTS = ("correlation", "gemm")


def mistyped_layers(log: str, types: Mapping[str, str]) -> list[str]:
    """Return the layers that an engine does not compute in the expected type, or that none of its kernels names.

    Args:
        log: the builder's verbose log, which lists the engine's kernels.
        types: expected type per layer name, as TensorRT calls it: `Int8`, `Half`.
    """
    # An INT8 node also appears in the kernels that quantise its input or add its bias. A product that was fused with
    # its neighbours has no kernel of its own; its types are among those of the fused kernel.
    own: dict[str, list[str]] = {}
    fused: dict[str, list[str]] = {}
    for kernel in _KERNEL.finditer(log):
        inputs = re.findall(r"Datatype: (\w+)", kernel["inputs"])
        for name in re.findall(r"\[ONNX Layer: ([^\]]*)\]", kernel["nodes"]):
            fused.setdefault(name, []).extend(inputs)
            if kernel["kind"] in _PRODUCTS:
                own.setdefault(name, []).extend(inputs[:1])
    return [name for name, kind in types.items() if kind not in (own.get(name) or fused.get(name) or ())]
