"""An image tower that computes as its static INT8 version will."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from clip_rd_edge.contract.checkpoint import model_folder
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.loader import StepSampler, ViewDataset, step_loader
from clip_rd_edge.distillation.quantized.fake_quant import ActivationRanges, RoundingToInt8, Watching
from clip_rd_edge.distillation.quantized.placement import Int8Placement, norms_after_convolutions
from clip_rd_edge.errors import UsageError
from clip_rd_edge.models.clip import ClipModel, ImageTower


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
