"""OpenVINO: the same ONNX files, run and measured by OpenVINO; and INT8 as it computes it best."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import msgspec
import onnx

from clip_rd_edge.bundle.manifest import Tower
from clip_rd_edge.exporting.formats import Converted, Format, Job
from clip_rd_edge.exporting.graph import file_content, norm_nodes, silently, weighted_layers
from clip_rd_edge.exporting.int8.candidates import Backend, Candidate, Float32Tower, static_candidates
from clip_rd_edge.exporting.int8.methods import StaticQuantizer, measure_ranges, with_token_embeddings
from clip_rd_edge.exporting.int8.rounding import RoundedLayers
from clip_rd_edge.exporting.int8.saturation import MAX_WEIGHT
from clip_rd_edge.exporting.int8.search import write_int8
from clip_rd_edge.exporting.int8.symmetric import quantize_symmetrically, quantized_inputs
from clip_rd_edge.exporting.parity import Inputs, measure
from clip_rd_edge.exporting.plan import WeightBits
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.backends.openvino import open_openvino

TARGET = "openvino"


class OpenVino(Format):
    """ONNX for OpenVINO. bf16 is a hint to it: the manifest has it, and the files stay in float32."""

    def convert(self, job: Job) -> Converted:
        """Write the bundle; latency is measured against float32 in ONNX Runtime."""
        if job.plan.precision == "int8":
            return write_int8(job, OPENVINO)
        precision, threads = job.plan.precision, job.plan.threads
        bf16 = precision == "bf16"

        def convert(name: str, tower: Tower) -> Tower:
            model = str(shutil.copyfile(job.source / tower.file, job.folder / tower.file))
            session, reference = open_openvino(model, threads=threads, bf16=bf16), open_session(model, threads=threads)
            measured, note = measure(session, reference, job.inputs[name], threads=threads), ""
            if measured.speedup < 1:
                times = f"{1 / measured.speedup:.2f} times as long here as float32 in ONNX Runtime"
                note = f"{precision}: OpenVINO takes {times}."
            return msgspec.structs.replace(tower, precision=precision, note=note, measured=measured)

        return job.convert_towers(convert, doing="comparing OpenVINO with ONNX Runtime", target=TARGET)


def openvino_candidates(tower: Float32Tower) -> Iterator[Candidate]:
    """Yield candidates with U8 and with S8 activations: OpenVINO has fast kernels for both, but S8 is not always right.

    If NNCF is installed, its Q/DQ is tried too: it is sometimes faster and mostly less accurate. Dynamic INT8 is not
    tried, because OpenVINO computes it in float. Each candidate of a text tower has its token embeddings in INT8, too,
    except for one, in case they lose most.
    """
    model, samples, weight_bits, rounded = tower.model, tower.calibrate, tower.plan.weight_bits, tower.rounded()
    quantizer = StaticQuantizer(model, samples, weight_bits=weight_bits, rounded=rounded)
    symmetric = Candidate("symmetric, percentile", partial(symmetric_int8, model, samples, weight_bits, rounded))
    of_layers = [*static_candidates(quantizer, tower), symmetric]
    if nncf_is_installed():
        of_layers.append(Candidate("NNCF", partial(quantize_by_nncf, model, samples, weight_bits)))
    if not tower.takes_ids:
        yield from of_layers
        return
    for candidate in of_layers:
        make = partial(with_token_embeddings, candidate.make)
        yield Candidate(f"{candidate.name}, and token embeddings", make)
    yield Candidate(f"{symmetric.name}, token embeddings in float", symmetric.make)
    yield Candidate("token embeddings only", partial(with_token_embeddings, lambda: model))


def symmetric_int8(
    model: Path, samples: Inputs, weight_bits: WeightBits, rounded: RoundedLayers | None = None
) -> bytes:
    """Return a prepared float32 model with S8 Q/DQ on all its layers, as file content."""
    graph = onnx.load(model)
    ranges = measure_ranges(graph, quantized_inputs(graph), samples)["percentile"]
    quantized = quantize_symmetrically(graph, ranges, max_weight=MAX_WEIGHT[weight_bits], rounded=rounded)
    return file_content(quantized)


def nncf_is_installed() -> bool:
    return find_spec("nncf") is not None


def quantize_by_nncf(model: Path, samples: Inputs, weight_bits: WeightBits) -> bytes:
    """Return a float32 model with the Q/DQ that NNCF inserts for OpenVINO, as file content.

    Args:
        weight_bits: 7 is NNCF's overflow fix, in all layers.
    """
    import nncf

    graph = onnx.load(model)
    name = graph.graph.input[0].name
    # A tower with at most one convolution, the patch embedding, is a transformer. MobileViT loses more with those
    # settings.
    kind = None if len(weighted_layers(graph, ("Conv",))) > 1 else nncf.ModelType.TRANSFORMER
    with silently():
        data = nncf.Dataset([{name: sample[None]} for sample in samples])
        fix = nncf.OverflowFix.ENABLE if weight_bits == 7 else nncf.OverflowFix.DISABLE
        quantized = nncf.quantize(
            graph,
            data,
            model_type=kind,
            subset_size=len(samples),
            # It would round the final norm, too.
            ignored_scope=nncf.IgnoredScope(names=sorted(norm_nodes(graph.graph))),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
        )
    return file_content(quantized)


OPENVINO = Backend(TARGET, open_openvino, openvino_candidates)
