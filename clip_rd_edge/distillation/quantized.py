"""An image tower that computes with INT8 rounding wherever the exporter's static Q/DQ will be placed.

U8 activations and constants, 7-bit S8 weights per output channel, in float32. Gradients pass straight through the
rounding (Jacob et al. 2018, arXiv:1712.05877), so a tower can adapt to it.

`exporting.int8` quantises convolutions, matrix products with weights, and the elementwise operations after them. The
same rule is applied here to torch functions as they are called, so a model needs neither replaced modules nor a traced
graph: its parameters, checkpoints and optimiser stay the same. Batch norms are folded into the convolution before them,
and ReLUs into the layer before them, as in the exported graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clip_rd_edge.data.order import StepSampler
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.loader import ViewDataset, step_loader
from clip_rd_edge.distillation.pixels import Normaliser
from clip_rd_edge.errors import UsageError
from clip_rd_edge.exporting.int8.methods import range_without_outliers, range_without_ties
from clip_rd_edge.exporting.int8.saturation import MAX_WEIGHT
from clip_rd_edge.models.clip import (
    ClipModel,
    ImageTower,
    evaluation_mode,
    forget_attention_biases,
    inference_image_tower,
)

_UINT8 = (0, 255)
_WEIGHT = (-MAX_WEIGHT[7], MAX_WEIGHT[7])  # as for every target whose processor is not known in advance
_MIN_SCALE = 1e-12  # for tensors that are always 0


_CALIBRATION_PAIRS = 128  # as many as the exporter uses


class ActivationRanges:
    """Min and max of each activation that INT8 will hold, (n,) each, in the order of computation."""

    def __init__(self) -> None:
        self.low, self.high = torch.zeros(0), torch.zeros(0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, for the run's checkpoints."""
        return {"low": self.low, "high": self.high}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.low, self.high = state["low"], state["high"]

    def tower(self, student: ClipModel) -> QuantizedTower:
        """Return the image tower of `student`, or of its moving average, with INT8 rounding."""
        return QuantizedTower(ImageTower(student.model), self, torch.zeros(1, 3, *student.preprocessing.size))

    def measure(self, student: ClipModel, dataset: ViewDataset, config: RunConfig) -> None:
        """Set the ranges from the first pairs of the run, which are the same in every process."""
        batch_size = min(config.recipe.batch_size, _CALIBRATION_PAIRS)
        steps = min(_CALIBRATION_PAIRS, len(dataset.pairs)) // batch_size
        sampler = StepSampler(dataset.pairs.groups, batch_size, seed=config.seed, steps=range(steps))
        normalise = Normaliser(student.preprocessing, _device(student.model))
        batches = step_loader(dataset, sampler, workers=0)
        self.tower(student).calibrate(normalise(batch.student_pixels) for batch in batches)


class RangeObserver:
    """Called with each tensor that INT8 will hold, it returns the tensor to compute with: the same one.

    It records the ranges of activations by their index; if called again for an index, the last call counts. What is
    pooled keeps the scale of its input. Weights are those of a layer, (out, …), and constants such as biases are added
    or multiplied elementwise.

    Attributes:
        ranges: low and high percentile of each activation.
    """

    def __init__(self) -> None:
        self.ranges: dict[int, tuple[float, float]] = {}

    def activation(self, index: int, values: Tensor) -> Tensor:
        self.ranges[index] = range_without_outliers(values.detach().float().cpu().numpy())
        return values

    def pooled(self, index: int, values: Tensor) -> Tensor:
        return values

    def weight(self, values: Tensor) -> Tensor:
        return values

    constant = weight


class FakeQuantizer:
    """Has the methods of `RangeObserver`; rounds activations within given ranges, and weights within their own."""

    def __init__(self, ranges: ActivationRanges, device: torch.device) -> None:
        scales, zero_points = _affine(ranges.low, ranges.high)
        self._scales, self._zero_points = scales.to(device), zero_points.to(device)

    def activation(self, index: int, values: Tensor) -> Tensor:
        scale, zero_point = self._scales[index], self._zero_points[index]
        return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, *_UINT8)

    pooled = activation

    def weight(self, values: Tensor) -> Tensor:
        scales = (values.detach().flatten(1).abs().amax(dim=1) / _WEIGHT[1]).clamp(min=_MIN_SCALE)
        zero_points = torch.zeros_like(scales, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(values, scales, zero_points, 0, *_WEIGHT)

    def constant(self, values: Tensor) -> Tensor:
        scale, zero_point = _affine(values.detach().amin().clamp(max=0), values.detach().amax().clamp(min=0))
        return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, *_UINT8)


def _affine(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and zero points of U8 for ranges that include 0, of any shape."""
    scales = ((high - low) / (_UINT8[1] - _UINT8[0])).clamp(min=_MIN_SCALE)
    return scales, (-low / scales).round().clamp(*_UINT8).to(torch.int32)


_T = Tensor
_CLAMPS = {F.relu, F.relu6, F.hardtanh, torch.relu, _T.relu}
_SIGMOIDS = {F.sigmoid, torch.sigmoid, _T.sigmoid}
_GATES: dict[Any, Callable[[Tensor], Tensor]] = {F.silu: torch.sigmoid, F.hardswish: F.hardsigmoid}  # x · gate(x)
_SUMS = {torch.add, _T.add, _T.__add__, _T.__radd__}
_PRODUCTS = {torch.mul, _T.mul, _T.__mul__, _T.__rmul__}
_MEANS = {torch.mean, _T.mean, F.adaptive_avg_pool2d}
_POOLS = {torch.max_pool2d, F.max_pool2d, F.avg_pool2d, torch._C._nn.avg_pool2d}
# By functions that write into their first argument: those that compute the same as a new tensor.
_OUT_OF_PLACE = {
    **{getattr(_T, f"{name}_"): getattr(_T, name) for name in ("add", "sub", "mul", "div", "clamp", "relu", "sigmoid")},
    **{_T.__iadd__: _T.add, _T.__isub__: _T.sub, _T.__imul__: _T.mul, _T.__itruediv__: _T.div},
    **{torch.relu_: torch.relu, torch.sigmoid_: torch.sigmoid},
}


class FakeQuantMode(TorchFunctionMode):
    """While active, passes the tensors that INT8 will hold to `hooks`. Use one instance per call of a tower.

    Args:
        norms: the batch norm after each convolution, by `id` of the convolution's weights; see
            `norms_after_convolutions`.
    """

    def __init__(self, hooks: RangeObserver | FakeQuantizer, norms: Mapping[int, FrozenBatchNorm]) -> None:
        super().__init__()
        self._hooks, self._norms = hooks, norms
        self._range_count = 0
        # By `id` of the tensor; storing the tensors themselves keeps their ids from being reused.
        self._outputs: dict[int, tuple[Tensor, int]] = {}  # quantised outputs, each with the index of its range
        self._held: dict[int, tuple[Tensor, Tensor]] = {}  # other tensors, each with what the graph holds instead
        self._normalized: set[int] = set()  # outputs that include a batch norm that is still to come

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self._as_held(args), {name: self._as_held(value) for name, value in (kwargs or {}).items()}
        if func is F.conv2d:
            return self._convolution(*args, **kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        if func is F.batch_norm and id(first) in self._normalized:
            self._normalized.remove(id(first))
            return first
        if id(first) not in self._outputs:
            return func(*args, **kwargs)
        if func not in _OUT_OF_PLACE and not kwargs.get("inplace"):
            return self._follower(func, first, args, kwargs)
        # The exported graph computes a new tensor, and reads it wherever the model reads the one it has written into.
        kwargs = {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs
        output = self._follower(_OUT_OF_PLACE.get(func, func), first, args, kwargs)
        self._held[id(first)] = (first, output)
        return output

    def _convolution(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        norm = self._norms.get(id(weight))
        if norm is not None:
            weight, bias = norm.fold_into(weight, bias)
        output = F.conv2d(self._layer_input(input), self._hooks.weight(weight), bias, *args, **kwargs)
        output = self._quantized_output(output)
        if norm is not None:
            self._normalized.add(id(output))
        return output

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rounded, weight = self._layer_input(input), self._hooks.weight(weight)
        if input.ndim == 2:  # exported as Gemm, with an INT32 bias
            return self._quantized_output(F.linear(rounded, weight, bias))
        product = self._quantized_output(F.linear(rounded, weight))  # exported as MatMul, and Add with an INT8 bias
        return product if bias is None else self._quantized_output(product + self._hooks.constant(bias))

    def _follower(self, func: Any, first: Tensor, args: Any, kwargs: Any) -> Any:
        """Return the output of `func`, quantised if the exporter keeps it in INT8."""
        if func in _CLAMPS:
            return self._quantized_output(func(*args, **kwargs), self._outputs[id(first)][1])
        if func in _GATES:
            return self._quantized_output(first * self._quantized_output(_GATES[func](first)))
        if func in _SIGMOIDS or func is F.hardsigmoid:
            return self._quantized_output(F.hardsigmoid(first) if func is F.hardsigmoid else torch.sigmoid(first))
        if func in _MEANS:
            return self._quantized_output(func(*args, **kwargs))
        if func in _POOLS:
            index = self._outputs[id(first)][1]
            output = self._hooks.pooled(index, func(*args, **kwargs))
            self._outputs[id(output)] = (output, index)
            return output
        if (func in _SUMS and "alpha" not in kwargs) or func in _PRODUCTS:
            second = self._operand(args[1] if len(args) > 1 else kwargs["other"])
            if second is not None:
                return self._quantized_output(first + second if func in _SUMS else first * second)
        return func(*args, **kwargs)

    def _operand(self, other: Any) -> Any:
        """Return the second operand of a sum or product as held in INT8, or None if it is in float."""
        if isinstance(other, nn.Parameter):
            return self._hooks.constant(other)
        return other if not isinstance(other, Tensor) or id(other) in self._outputs else None

    def _quantized_output(self, output: Tensor, index: int | None = None) -> Tensor:
        """Round an output, with a new range, or with range `index` if it is fused into the layer with that range."""
        if index is None:
            index = self._next_index()
        output = self._hooks.activation(index, output)
        self._outputs[id(output)] = (output, index)
        return output

    def _layer_input(self, value: Tensor) -> Tensor:
        if id(value) in self._outputs:
            return value
        if id(value) not in self._held:
            rounded = self._hooks.activation(self._next_index(), value)
            self._held[id(value)] = (value, rounded)
            self._held[id(rounded)] = (rounded, rounded)
        return self._held[id(value)][1]

    def _as_held(self, value: Any) -> Any:
        """Replace tensors that a layer has rounded as its input, or that were written into, by what the graph holds."""
        if isinstance(value, (tuple, list)):
            items = [self._as_held(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        while (held := self._held.get(id(value), (value, value))[1]) is not value:
            value = held
        return value

    def _next_index(self) -> int:
        self._range_count += 1
        return self._range_count - 1


@dataclass(frozen=True)
class FrozenBatchNorm:
    """A batch norm with fixed statistics: y = (x − mean) / sqrt(variance + epsilon) · weight + bias."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float

    def fold_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return weights (out, …) and bias of a convolution that includes this batch norm."""
        factor = torch.rsqrt(self.variance + self.epsilon)
        if self.weight is not None:
            factor = self.weight * factor
        shift = -self.mean * factor if self.bias is None else self.bias - self.mean * factor
        folded = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        return folded, shift if bias is None else shift + bias * factor


def norms_after_convolutions(tower: nn.Module, example: Tensor) -> dict[int, FrozenBatchNorm]:
    """Return the batch norm after each convolution of a tower, by `id` of the convolution's weights."""
    finder = _NormFinder()
    with torch.no_grad(), finder:
        tower(example)
    return finder.norms


class _NormFinder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.norms: dict[int, FrozenBatchNorm] = {}
        self._convolutions: dict[int, tuple[Tensor, Tensor, int]] = {}  # by `id` of the output, with its version

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.conv2d:
            self._convolutions[id(output)] = (output, args[1], output._version)
        if func is F.batch_norm:
            names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            _, weight, version = self._convolutions.get(id(arguments["input"]), (None, None, -1))
            if weight is not None and version == arguments["input"]._version:  # nothing has written into it since
                mean, variance, scale, bias = (arguments[name] for name in names[1:5])
                self.norms[id(weight)] = FrozenBatchNorm(mean, variance, scale, bias, arguments.get("eps", 1e-5))
        return output


class QuantizedTower(nn.Module):
    """A tower with INT8 rounding wherever the exporter's static Q/DQ will be placed, in all layers.

    Args:
        tower: in evaluation mode, on the device to run on. This module shares its parameters.
        example: pixels (N, 3, H, W) of at least one image, to find the batch norm after each convolution.
    """

    def __init__(self, tower: nn.Module, ranges: ActivationRanges, example: Tensor) -> None:
        super().__init__()
        self.tower, self.ranges = tower, ranges
        self.norms = norms_after_convolutions(tower, example.to(_device(tower)))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set `ranges` from the tower's float32 activations on batches of pixels, (N, 3, H, W) each.

        They are the means of the batches' percentiles, as the exporter's, extended to include 0.
        """
        found = []
        for pixels in batches:
            observer = RangeObserver()
            with FakeQuantMode(observer, self.norms):
                self.tower(pixels.to(_device(self.tower)))
            found.append([observer.ranges[index] for index in range(len(observer.ranges))])
        means = torch.tensor(found).mean(dim=0).tolist()  # of (batches, n, 2)
        low, high = torch.tensor([range_without_ties(*percentiles) for percentiles in means]).unbind(dim=1)
        self.ranges.low, self.ranges.high = low.clamp(max=0), high.clamp(min=0)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed pixels, (N, 3, H, W) to (N, D)."""
        forget_attention_biases(self.tower)
        with FakeQuantMode(FakeQuantizer(self.ranges, pixel_values.device), self.norms):
            embeddings: Tensor = self.tower(pixel_values)
        return embeddings


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def require_static_tower(student: ClipModel) -> None:
    """Check that the image tower of a student is exported in static INT8, with the layers that it is trained with."""
    if reason := _reason_against(student):
        raise UsageError(
            f"The image tower of {student.name} cannot be trained for INT8: {reason}.",
            hint="export it as it is with --precision int8",
            option="quantize",
        )


_MAX_DIFFERENCE = 0.05  # several times that of the rounding of TF32, in which GPUs compute


def _reason_against(student: ClipModel) -> str:
    visual = student.model.get_submodule("visual")
    # A single convolution is the patch embedding of a transformer; `exporting.int8.candidates` has the same rule.
    if sum(isinstance(module, nn.Conv2d) for module in visual.modules()) < 2:
        return "it is a transformer, which the exporter quantises dynamically, without ranges to adapt to"
    with evaluation_mode(student.model):
        tower, exported = ImageTower(student.model), inference_image_tower(student.model)
        size, device = student.preprocessing.size, _device(student.model)
        pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad(), FakeQuantMode(RangeObserver(), norms_after_convolutions(tower, pixels)):
            unrounded = tower(pixels)
        with torch.no_grad():
            difference = float((unrounded - tower(pixels)).norm())
        if difference > _MAX_DIFFERENCE:
            return (
                f"where nothing is rounded at all, its embeddings are still {difference:.1%} off, so that another "
                "network would be trained"
            )
        # Each branch would be rounded by itself, and the weights of the merged layer, which INT8 holds, never.
        if exported.model is not student.model and _range_count(exported, pixels) != _range_count(tower, pixels):
            return "it has parallel branches, which the exporter merges before it rounds"
    return ""


def _range_count(tower: nn.Module, example: Tensor) -> int:
    """Return how many activations of a tower INT8 would hold."""
    ranges = ActivationRanges()
    QuantizedTower(tower, ranges, example).calibrate([example])
    return len(ranges.low)
