"""Quantisation-aware distillation: a trained student learns to live with INT8, under the same objective and teacher.

`--quantize int8` fine-tunes a student whose image tower computes with the rounding of the exporter's static Q/DQ, in
every layer. Batch norms keep their figures and nothing is dropped out, so that what is trained is what is exported. The
text tower is trained as it is: its products are quantised as they run, which costs next to nothing. What is saved is
the float model; the exporter sets its ranges anew.
"""

from __future__ import annotations

import torch
from torch import nn

from clip_rd_edge.contract.checkpoint import model_folder
from clip_rd_edge.distill.config import RunConfig
from clip_rd_edge.distill.loader import StepSampler, ViewDataset, step_loader
from clip_rd_edge.errors import UsageError
from clip_rd_edge.models.clip import ClipModel, ImageTower
from clip_rd_edge.models.fake_quant import ActivationRanges
from clip_rd_edge.models.quantized_tower import QuantizedTower

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
