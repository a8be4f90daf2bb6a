"""Static INT8 by NNCF, OpenVINO's own quantiser, where it is installed. Never imports torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import onnx

from clip_rd_edge.exporters.measure import Inputs
from clip_rd_edge.exporters.quiet import silently
from clip_rd_edge.exporters.static import layers_of


def nncf_is_there() -> bool:
    """Whether NNCF is installed: `pip install nncf`."""
    return find_spec("nncf") is not None


def quantize_by_nncf(model: Path, samples: Inputs) -> bytes:
    """A float32 model with the Q/DQ that NNCF places for OpenVINO, as a file's content.

    Args:
        model: a float32 model that `quant_pre_process` has optimised.
        samples: what the ranges are measured on, (N, …).
    """
    import nncf

    graph = onnx.load(model)
    name = graph.graph.input[0].name
    # A tower with no convolution, or a patch embedding alone, is a transformer; on MobileViT those settings lose more.
    kind = None if len(layers_of(graph, ("Conv",))) > 1 else nncf.ModelType.TRANSFORMER
    with silently():
        data = nncf.Dataset([{name: sample[None]} for sample in samples])
        quantized = nncf.quantize(graph, data, model_type=kind, subset_size=len(samples))
    content: bytes = quantized.SerializeToString()
    return content
