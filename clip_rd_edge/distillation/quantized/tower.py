"""Where the exporter's static Q/DQ will stand, found while a tower runs in PyTorch.

`exporters.static` quantises convolutions and products with weights, and what follows them entry by entry. The same rule
is applied here to torch's functions as they are called, so that a model needs neither other modules nor a traced graph:
its parameters, checkpoints and optimiser stay what they are. Batch norms become part of the convolution before them,
and ReLUs of the layer before them, as in the exported graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clip_rd_edge.contract.checkpoint import model_folder
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.loader import StepSampler, ViewDataset, step_loader
from clip_rd_edge.distillation.quantized.fake_quant import ActivationRanges, Rounding, RoundingToInt8, Watching
from clip_rd_edge.errors import UsageError
from clip_rd_edge.models.clip import ClipModel, ImageTower

_T = Tensor
_CLAMPS = {F.relu, F.relu6, F.hardtanh, torch.relu, torch.relu_, _T.relu, _T.relu_}
_SIGMOIDS = {F.sigmoid, torch.sigmoid, _T.sigmoid, _T.sigmoid_}
_GATES: dict[Any, Callable[[Tensor], Tensor]] = {F.silu: torch.sigmoid, F.hardswish: F.hardsigmoid}  # x · gate(x)
_SUMS = {torch.add, _T.add, _T.add_, _T.__add__, _T.__radd__, _T.__iadd__}
_PRODUCTS = {torch.mul, _T.mul, _T.mul_, _T.__mul__, _T.__rmul__, _T.__imul__}
_MEANS = {torch.mean, _T.mean, F.adaptive_avg_pool2d}
_POOLS = {torch.max_pool2d, F.max_pool2d, F.avg_pool2d, torch._C._nn.avg_pool2d}


class Int8Placement(TorchFunctionMode):
    """While it is active, hands the numbers that INT8 will hold to `rounding`; for one call of one tower.

    Args:
        norms: the batch norm after a convolution, by `id` of the convolution's weights; see `models.folding`.
    """

    def __init__(self, rounding: Rounding, norms: Mapping[int, Norm]) -> None:
        super().__init__()
        self._rounding, self._norms = rounding, norms
        self._count = 0
        # By `id`; the tensors are kept, so that no id is given twice.
        self._given: dict[int, tuple[Tensor, int]] = {}  # what layers and their followers gave, and its range
        self._rounded: dict[int, tuple[Tensor, Tensor]] = {}  # what else a layer has read, and that rounded
        self._normed: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            return self._convolution(*args, **kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        if func is F.batch_norm and id(first) in self._normed:
            return first
        follower = self._follower(func, first, args, kwargs) if id(first) in self._given else None
        if follower is not None:
            return follower
        return func(*self._as_read(args), **{name: self._as_read(value) for name, value in kwargs.items()})

    def _convolution(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor:
        norm = self._norms.get(id(weight))
        if norm is not None:
            weight, bias = norm.folded_into(weight, bias)
        output = F.conv2d(self._read(input), self._rounding.weight(weight), bias, *rest, **more)
        output = self._give(output)
        if norm is not None:
            self._normed.add(id(output))
        return output

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        read, weight = self._read(input), self._rounding.weight(weight)
        if input.ndim == 2:  # Gemm, whose bias is INT32
            return self._give(F.linear(read, weight, bias))
        product = self._give(F.linear(read, weight))  # MatMul, and an Add whose bias is INT8
        return product if bias is None else self._give(product + self._rounding.constant(bias))

    def _follower(self, func: Any, first: Tensor, args: Any, kwargs: Any) -> Tensor | None:
        """What `func` gives where INT8 goes on through it, else None."""
        if func in _CLAMPS:
            number = self._given[id(first)][1]
            return self._give(func(*args, **{**kwargs, "inplace": False} if "inplace" in kwargs else kwargs), number)
        if func in _GATES:
            return self._give(first * self._give(_GATES[func](first)))
        if func in _SIGMOIDS or func is F.hardsigmoid:
            return self._give(F.hardsigmoid(first) if func is F.hardsigmoid else torch.sigmoid(first))
        if func in _MEANS:
            return self._give(func(*args, **kwargs))
        if func in _POOLS:
            number = self._given[id(first)][1]
            output = self._rounding.again(number, func(*args, **kwargs))
            self._given[id(output)] = (output, number)
            return output
        if func in _SUMS or func in _PRODUCTS:
            second = self._operand(args[1])
            if second is not None:
                return self._give(first + second if func in _SUMS else first * second)
        return None

    def _operand(self, other: Any) -> Any:
        """The other operand of a sum or product as INT8 holds it, or None where it is in float."""
        if isinstance(other, nn.Parameter):
            return self._rounding.constant(other)
        return other if not isinstance(other, Tensor) or id(other) in self._given else None

    def _give(self, output: Tensor, number: int | None = None) -> Tensor:
        """What a layer or a follower has given, rounded, in a range of its own or in that of what it became part of."""
        if number is None:
            number = self._next()
        output = self._rounding.activation(number, output)
        self._given[id(output)] = (output, number)
        return output

    def _read(self, value: Tensor) -> Tensor:
        """What a layer reads, rounded."""
        if id(value) in self._given:
            return value
        if id(value) not in self._rounded:
            rounded = self._rounding.activation(self._next(), value)
            self._rounded[id(value)] = (value, rounded)
            self._rounded[id(rounded)] = (rounded, rounded)
        return self._rounded[id(value)][1]

    def _as_read(self, value: Any) -> Any:
        """Arguments with each tensor that a layer has read replaced by what it read: the graph has it once."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._as_read(part) for part in value)
        return self._rounded[id(value)][1] if isinstance(value, Tensor) and id(value) in self._rounded else value

    def _next(self) -> int:
        self._count += 1
        return self._count - 1


@dataclass(frozen=True)
class Norm:
    """A batch norm that keeps its figures: y = (x − mean) / sqrt(variance + epsilon) · weight + bias."""

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor
    epsilon: float

    def folded_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights (out, …) and bias of the convolution that does both."""
        factor = self.weight * torch.rsqrt(self.variance + self.epsilon)
        shift = self.bias - self.mean * factor
        folded = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        return folded, shift if bias is None else shift + bias * factor


def norms_after_convolutions(tower: nn.Module, example: Tensor) -> dict[int, Norm]:
    """The batch norm that reads each convolution of a tower, by `id` of the convolution's weights."""
    finder = _NormFinder()
    with torch.no_grad(), finder:
        tower(example)
    return finder.norms


class _NormFinder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.norms: dict[int, Norm] = {}
        self._convolutions: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.conv2d:
            self._convolutions[id(output)] = (output, args[1])
        if func is F.batch_norm:
            names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if id(given["input"]) in self._convolutions:
                weight = self._convolutions[id(given["input"])][1]
                mean, variance, scale, bias = (given[name] for name in names[1:5])
                self.norms[id(weight)] = Norm(mean, variance, scale, bias, given.get("eps", 1e-5))
        return output


class QuantizedTower(nn.Module):
    """A tower with INT8's rounding at every place where the exporter's static Q/DQ will stand; no layer is left out.

    Args:
        tower: in evaluation mode, on the device that it is to run on; its parameters are this module's.
        ranges: of its activations; see `calibrate`.
        example: pixels (N, 3, H, W) of a picture or more, to see what follows what.

    Attributes:
        norms: what `Int8Placement` takes.
    """

    def __init__(self, tower: nn.Module, ranges: ActivationRanges, example: Tensor) -> None:
        super().__init__()
        self.tower, self.ranges = tower, ranges
        self.norms = norms_after_convolutions(tower, example.to(_device(tower)))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set `ranges` by what the tower's activations are in float32 on some batches of pixels, (N, 3, H, W) each."""
        watching = Watching()
        for pixels in batches:
            with Int8Placement(watching, self.norms):
                self.tower(pixels.to(_device(self.tower)))
            watching.end_batch()
        watching.write_to(self.ranges)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) to embeddings (N, D)."""
        with Int8Placement(RoundingToInt8(self.ranges, pixel_values.device), self.norms):
            embeddings: Tensor = self.tower(pixel_values)
        return embeddings


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


_CALIBRATION_PAIRS = 128  # as many as the exporter takes


class Quantization:
    """The ranges of a run's image tower, and the tower with INT8's rounding.

    Attributes:
        ranges: part of the run's checkpoints.
    """

    def __init__(self) -> None:
        self.ranges = ActivationRanges()

    def calibrate(self, student: ClipModel, dataset: ViewDataset, config: RunConfig) -> None:
        """Set the ranges by the first pairs of the run; every process sees the same."""
        batch_size = min(config.recipe.batch_size, _CALIBRATION_PAIRS)
        steps = min(_CALIBRATION_PAIRS, len(dataset.pairs)) // batch_size
        sampler = StepSampler(len(dataset.pairs), batch_size, seed=config.seed, start=0, stop=steps)
        self.tower(student).calibrate(batch.student_pixels for batch in step_loader(dataset, sampler, workers=0))

    def tower(self, student: ClipModel) -> QuantizedTower:
        """The image tower of `student`, or of its moving average, with INT8's rounding."""
        return QuantizedTower(ImageTower(student.model), self.ranges, torch.zeros(1, 3, *student.preprocessing.size))


def require_fit(config: RunConfig) -> None:
    """Refuse what does not go with quantisation, before anything is loaded; raises UsageError."""
    if config.quantize is None:
        return
    if model_folder(config.student) is None:
        raise UsageError(
            f"Quantisation fine-tunes a trained student, and {config.student} is one that is still to be trained.",
            hint="train it first without --quantize, and give that run: --student RUN --quantize int8",
        )
    if config.recipe.precision != "fp32":
        raise UsageError(f"INT8's rounding is computed in fp32, not in {config.recipe.precision}.")
    for name in ("compile", "gradient_checkpointing"):
        if getattr(config, name):
            raise UsageError(f"--{name.replace('_', '-')} does not go with --quantize.", hint="leave it away")


def require_convolutions(student: ClipModel) -> None:
    """Refuse a student whose image tower the exporter quantises as it runs; raises UsageError."""
    visual = student.model.get_submodule("visual")
    # One convolution is the patch embedding of a transformer, as `exporters.candidates` has it.
    if sum(isinstance(module, nn.Conv2d) for module in visual.modules()) < 2:
        raise UsageError(
            f"The image tower of {student.name} is a transformer, which the exporter quantises as it runs: "
            "there are no ranges to learn to live with.",
            hint="export it with --precision int8 as it is",
        )
