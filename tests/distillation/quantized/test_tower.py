"""The image tower with INT8's rounding against what the exporter and ONNX Runtime make of the same weights."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from support import Watch
from torch import nn

from clip_rd_edge.contract.checkpoint import WEIGHTS_FILE
from clip_rd_edge.convert.graph import preprocessed
from clip_rd_edge.convert.int8.static import StaticQuantizer
from clip_rd_edge.distillation.config import QUANTIZED, RunConfig, load_recipe
from clip_rd_edge.distillation.metrics import read_metrics
from clip_rd_edge.distillation.quantized.fake_quant import ActivationRanges, RoundingToInt8
from clip_rd_edge.distillation.quantized.tower import Int8Placement, QuantizedTower
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.errors import UsageError
from clip_rd_edge.exporters.onnx import export_image_tower
from clip_rd_edge.models.clip import ClipModel, ImageTower
from clip_rd_edge.models.load import save_clip
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


STEPS = 5


def saved(folder: Path, trunk: str, *, image_size: int = 48) -> Path:
    torch.manual_seed(1)
    config = student_config(trunk, embedding_size=24, image_size=image_size, text="tiny", context_length=12)
    save_clip(folder, build_student(config, name=trunk), provenance={})
    return folder


@pytest.fixture
def config(pairs_csv: Path, tmp_path: Path) -> RunConfig:
    recipe = msgspec.structs.replace(load_recipe("clip-rd"), **{**QUANTIZED, "steps": STEPS, "batch_size": 6})
    return RunConfig(
        recipe_name="clip-rd",
        recipe=recipe,
        data=str(pairs_csv),
        teacher=str(saved(tmp_path / "teacher", "test_resnet")),
        teacher_precision="fp32",
        student=str(saved(tmp_path / "trained", "test_efficientnet")),
        quantize="int8",
        checkpoint_every=2,
        log_every=1,
        workers=0,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def test_it_trains_what_is_exported_and_goes_on_where_it_was_killed(config: RunConfig, tmp_path: Path) -> None:
    import open_clip

    whole = run_distillation(config, tmp_path / "whole", resume=False)
    before, after = weights(Path(config.student)), weights(whole)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("running" in name or "num_batches" in name for name in changed)
    assert {"visual.trunk.conv_stem.weight", "visual.trunk.bn1.weight", "text.text_projection"} <= changed
    assert "quantize: int8" in (tmp_path / "whole" / "config.yaml").read_text()
    open_clip.create_model(f"local-dir:{whole}", require_pretrained=True).load_state_dict(after)

    def kill(step: int) -> None:
        if step == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        run_distillation(config, tmp_path / "killed", resume=False, reporter=Watch(on_step=kill))
    resumed = weights(run_distillation(config, tmp_path / "killed", resume=True))
    assert all(torch.equal(after[name], resumed[name]) for name in after)


@pytest.mark.slow
def test_its_loss_is_that_of_the_rounded_tower(config: RunConfig, tmp_path: Path) -> None:
    one = msgspec.structs.replace(config.recipe, steps=1)
    losses = []
    for name, quantize in (("int8", "int8"), ("float", None)):
        run_distillation(msgspec.structs.replace(config, recipe=one, quantize=quantize), tmp_path / name, resume=False)
        losses.append(read_metrics(tmp_path / name)[0]["loss"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"student": "mobilevit_xxs"}, "fine-tunes a trained student, and mobilevit_xxs is one that is still to be"),
        ({"compile": True}, "--compile does not go with --quantize"),
        ({"gradient_checkpointing": True}, "--gradient-checkpointing does not go with --quantize"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    config: RunConfig, tmp_path: Path, change: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        run_distillation(msgspec.structs.replace(config, **change), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_other_precisions_and_transformers_are_refused(config: RunConfig, tmp_path: Path) -> None:
    half = msgspec.structs.replace(config, recipe=msgspec.structs.replace(config.recipe, precision="bf16"))
    with pytest.raises(UsageError, match="computed in fp32, not in bf16"):
        run_distillation(half, tmp_path / "run", resume=False)
    transformer = saved(tmp_path / "transformer", "test_vit", image_size=160)
    with pytest.raises(UsageError, match="is a transformer, which the exporter quantises as it runs"):
        run_distillation(msgspec.structs.replace(config, student=str(transformer)), tmp_path / "run", resume=False)
