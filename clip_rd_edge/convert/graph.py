"""What every conversion does with an ONNX graph, and silence for the libraries that do it. Never imports torch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx


@contextlib.contextmanager
def silently() -> Iterator[None]:
    """Without progress lines, warnings and log, which say nothing that a user can act on. Errors still come through."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def preprocessed(model: Path, folder: Path) -> Path:
    """A model as the quantisers want it: constants folded, batch norms in their convolutions, shapes inferred."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / f"preprocessed-{model.name}"
    with silently():
        # Symbolic shape inference fails on open_clip's text towers, and nothing here needs it.
        quant_pre_process(str(model), str(path), skip_symbolic_shape=True)
    return path


def float_tensors(graph: onnx.GraphProto) -> set[str]:
    """Names of the activations that a graph with inferred shapes describes as float32; weights are not among them."""
    described = (*graph.input, *graph.output, *graph.value_info)
    return {value.name for value in described if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}


def with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy of a model whose outputs include the named tensors, so that a session returns their values."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {output.name for output in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in present)
    return copy
