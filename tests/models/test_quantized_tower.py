"""The image tower with INT8's rounding against what the exporter and ONNX Runtime make of the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from clip_rd_edge.exporters.onnx import export_image_tower
from clip_rd_edge.exporters.static import StaticQuantizer, preprocessed
from clip_rd_edge.models.clip import ClipModel, ImageTower
from clip_rd_edge.models.fake_quant import ActivationRanges, RoundingToInt8
from clip_rd_edge.models.int8_placement import Int8Placement
from clip_rd_edge.models.quantized_tower import QuantizedTower
from clip_rd_edge.models.student import build_student, student_config

SIZE = 64
Pixels = npt.NDArray[np.float32]


def student(trunk: str) -> ClipModel:
    """A student in evaluation mode whose batch norms have figures as after a training."""
    torch.manual_seed(0)
    clip = build_student(
        student_config(trunk, embedding_size=24, image_size=SIZE, text="tiny", context_length=12), name=trunk
    )
    for module in clip.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    clip.model.eval()
    return clip


def pictures() -> Pixels:
    rng = np.random.default_rng(0)
    coarse = rng.uniform(-1, 1, (32, 3, 8, 8)).repeat(8, axis=2).repeat(8, axis=3)
    return (coarse + 0.3 * rng.standard_normal((32, 3, SIZE, SIZE))).astype(np.float32)


def quantized(clip: ClipModel, pixels: Pixels) -> QuantizedTower:
    tower = QuantizedTower(ImageTower(clip.model), ActivationRanges(), torch.zeros(1, 3, SIZE, SIZE))
    tower.calibrate(torch.from_numpy(pixels[i : i + 8]) for i in range(0, len(pixels), 8))  # as the exporter's batches
    return tower


class Recording(RoundingToInt8):
    """Keeps the step and the values of every activation, rounded."""

    def __init__(self, ranges: ActivationRanges) -> None:
        super().__init__(ranges, torch.device("cpu"))
        self._steps = ((ranges.high - ranges.low) / 255).tolist()
        self.kept: dict[int, tuple[float, Pixels]] = {}  # by number; pooled ones by numbers below 0

    def activation(self, number: int, values: torch.Tensor) -> torch.Tensor:
        rounded = super().activation(number, values)
        self.kept[number] = (self._steps[number], rounded.detach().numpy())
        return rounded

    def again(self, number: int, values: torch.Tensor) -> torch.Tensor:
        rounded = super().again(number, values)
        self.kept[-1 - len(self.kept)] = (self._steps[number], rounded.detach().numpy())
        return rounded


def int8_tensors(exported: bytes, pixels: Pixels) -> list[tuple[float, Pixels]]:
    """The step and the values of every activation that the exported tower holds in INT8."""
    model = onnx.load_from_string(exported)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    pairs = [(node.input[1], readers[node.output[0]]) for node in model.graph.node if node.op_type == "QuantizeLinear"]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for _, name in pairs)
    # As the graph says: with its layers fused, ONNX Runtime rounds some more of them the other way.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    values = session.run([name for _, name in pairs], {"pixel_values": pixels})
    return [
        (float(numpy_helper.to_array(constants[scale])), value) for (scale, _), value in zip(pairs, values, strict=True)
    ]


@pytest.mark.parametrize(
    "trunk",
    [
        pytest.param("test_resnet", marks=pytest.mark.slow),  # ReLU, residual sums, max pooling
        "test_efficientnet",  # SiLU, depthwise convolutions
        pytest.param("mobilenetv3_small", marks=pytest.mark.slow),  # hard swish, squeeze and excitation
        pytest.param("mobilevit_xxs", marks=pytest.mark.slow),  # attention between convolutions
    ],
)
def test_it_computes_what_the_exported_int8_tower_does(trunk: str, tmp_path: Path) -> None:
    clip, pixels = student(trunk), pictures()
    quantizer = StaticQuantizer(preprocessed(export_image_tower(clip, tmp_path), tmp_path), pixels)
    theirs = int8_tensors(quantizer.quantize("percentile", quantizer.layers), pixels[:8])
    tower = quantized(clip, pixels)
    ours = Recording(tower.ranges)
    with torch.no_grad(), Int8Placement(ours, tower.norms):
        tower.tower(torch.from_numpy(pixels[:8]))

    left = set(ours.kept)
    for step, values in theirs:
        same = [
            number
            for number, (own, kept) in ours.kept.items()
            if kept.size == values.size and np.isclose(own, step, rtol=1e-3)
        ]
        assert same, f"they hold {values.shape} in steps of {step}, and we do not"
        off = min(np.abs(ours.kept[number][1].reshape(values.shape) - values).mean() / step for number in same)
        # Of the first layer some hundredths of a percent round the other way, and ever more of what comes behind it;
        # where a range is wide, one of its steps is many of the sigmoid's that follows.
        assert off < (1e-3 if 1 in same else 8), f"{off} of 255 steps between us, in steps of {step}"
        left -= set(same)
    assert left == set(), "what we hold in INT8, and they do not"


def test_every_weight_learns_through_the_rounding() -> None:
    clip = student("test_efficientnet")
    tower = quantized(clip, pictures())
    tower(torch.from_numpy(pictures()[:4])).square()[:, 0].sum().backward()
    visual = clip.model.get_submodule("visual")
    assert [name for name, parameter in visual.named_parameters() if parameter.grad is None] == []
    first = next(parameter for parameter in visual.parameters() if parameter.ndim == 4)
    assert first.grad is not None
    assert float(first.grad.abs().sum()) > 0


def test_the_model_is_as_before_outside_of_it() -> None:
    clip, pixels = student("test_resnet"), torch.from_numpy(pictures()[:2])
    with torch.no_grad():
        before = ImageTower(clip.model)(pixels)
        inside = quantized(clip, pictures())(pixels)
        after = ImageTower(clip.model)(pixels)
    assert torch.equal(before, after)
    assert not torch.allclose(before, inside, atol=1e-5)
