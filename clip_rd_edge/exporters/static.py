"""Static INT8: ranges of activations are measured beforehand, and stand in the graph as Q/DQ. Never imports torch."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import onnx

from clip_rd_edge.contract.encoder import in_batches
from clip_rd_edge.exporters.measure import Inputs
from clip_rd_edge.exporters.quiet import silently

RangeMethod = Literal["min-max", "percentile"]
PERCENTILE = 99.99  # what a few outliers do to a range costs all others their resolution
_LAYERS = ("Conv", "Gemm", "MatMul")
_BATCH_SIZE = 16
# Percentiles need histograms of all activations, which take seconds where minima and maxima take milliseconds.
_PERCENTILE_SAMPLES = 32


class StaticQuantizer:
    """Quantises any of a tower's layers: U8 activations, S8 weights by channel, all else left in float.

    U8 with S8 is what ONNX Runtime's kernels for CPUs are fastest with. Products of two activations, as in attention,
    stay in float, and so do Softmax and what is done entry by entry.

    Args:
        model: path of a float32 model that `quant_pre_process` has optimised.
        samples: what the ranges are measured on.
    """

    def __init__(self, model: Path, samples: Inputs) -> None:
        self._path = model
        self._model = onnx.load(model)
        self._samples = samples
        self._ranges: dict[RangeMethod, Any] = {}
        self.layers: tuple[str, ...] = tuple(node.name for node in layers_of(self._model))

    def quantize(self, method: RangeMethod, layers: Sequence[str]) -> bytes:
        """The model with `layers`, a subset of `self.layers`, in INT8, as a file's content."""
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        with silently():
            ranges = self._measured(method)
            quantizer = QDQQuantizer(
                copy.deepcopy(self._model),
                per_channel=True,
                reduce_range=False,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=ranges,
                nodes_to_quantize=list(layers),
                nodes_to_exclude=[],
                op_types_to_quantize=list(_LAYERS),
                extra_options={},
            )
            quantizer.quantize_model()
        content: bytes = quantizer.model.model.SerializeToString()
        return content

    def _measured(self, method: RangeMethod) -> Any:
        if method not in self._ranges:
            self._ranges[method] = self._measure(method)
        return self._ranges[method]

    def _measure(self, method: RangeMethod) -> Any:
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        exact = method == "min-max"
        samples = self._samples if exact else self._samples[:_PERCENTILE_SAMPLES]
        with tempfile.TemporaryDirectory() as folder:
            calibrator = create_calibrator(
                self._path,
                list(_LAYERS),
                augmented_model_path=str(Path(folder) / "augmented.onnx"),
                calibrate_method=CalibrationMethod.MinMax if exact else CalibrationMethod.Percentile,
                extra_options={} if exact else {"percentile": PERCENTILE},
            )
            for batch in in_batches(
                len(samples), _BATCH_SIZE
            ):  # one at a time: it keeps all that it has not yet counted
                calibrator.collect_data(_Reader(self._model.graph.input[0].name, samples[batch]))
            return calibrator.compute_data()


class _Reader:
    """One batch, as ONNX Runtime's CalibrationDataReader gives it."""

    def __init__(self, name: str, batch: Inputs) -> None:
        self._feeds = [{name: batch}]

    def get_next(self) -> dict[str, Inputs] | None:
        return self._feeds.pop() if self._feeds else None


def layers_of(model: onnx.ModelProto, kinds: Sequence[str] = _LAYERS) -> list[onnx.NodeProto]:
    """A model's nodes of these kinds that have weights: those whose second input is a constant."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type in kinds and node.input[1] in constants]


def preprocessed(model: Path, folder: Path) -> Path:
    """A model as the quantisers want it: constants folded, batch norms in their convolutions, shapes inferred."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / f"preprocessed-{model.name}"
    with silently():
        # Symbolic shape inference fails on open_clip's text towers, and nothing here needs it.
        quant_pre_process(str(model), str(path), skip_symbolic_shape=True)
    return path
