"""Not a test: print how far apart training ends in channels-last format and in torch's own. See test_strided.py.

In a process of its own, which damaged memory may end.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace

import timm
import torch
from torch import Tensor, nn

from clip_rd_edge.distillation.config import load_recipe
from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.step import StepSettings, TrainingStep
from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.models.clip import ClipModel, ImageTower, to_device
from clip_rd_edge.models.students import build_student, student_config

SIZE, STEPS, LEARNING_RATE = 96, 5, 5e-4
CAPTIONS = ["a cat", "two dogs", "red", "a very blue sky", "0", "tea", "a boat at sea", "night"]


class Contiguous(nn.Module):
    """A tower that sees pixels in torch's own layout, (N, 3, H, W)."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        embeddings: Tensor = self.tower(pixels.contiguous())
        return embeddings


def first_layers(trunk: str) -> nn.Module:
    """Return an image tower that is deep enough: rounding grows from layer to layer, and the more the fewer images."""
    whole = timm.create_model(trunk, num_classes=0)
    layers = [whole.get_submodule("stem"), whole.get_submodule("stages.0"), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    tower = nn.Sequential(*layers, nn.LazyLinear(16))
    tower(torch.zeros(2, 3, SIZE, SIZE))
    return tower


def trained(student: ClipModel, *, channels_last: bool) -> dict[str, Tensor]:
    """Return the weights of the image tower of a copy of a student after some steps."""
    student, processes = replace(student, model=copy.deepcopy(student.model)), Processes()
    tower: nn.Module = ImageTower(student.model)
    if channels_last:
        to_device(student.model, processes.device)
    else:
        tower = Contiguous(tower)
    objective = Objective(load_recipe("clip").objective)
    step = TrainingStep(student, None, objective, processes, StepSettings(), image_tower=tower)
    optimizer = torch.optim.SGD(student.model.parameters(), lr=LEARNING_RATE)
    coarse = torch.randint(256, (len(CAPTIONS), 3, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
    pixels = coarse.repeat_interleave(SIZE // 8, dim=2).repeat_interleave(SIZE // 8, dim=3)
    for number in range(STEPS):
        optimizer.zero_grad()
        step(Batch(pixels, (), CAPTIONS), number)
        optimizer.step()
    return {name: value.detach() for name, value in student.model.get_submodule("visual").named_parameters()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


def main(*trunks: str) -> None:
    """Print for each trunk the largest difference between weights of the two layouts, and their largest change."""
    torch.manual_seed(0)
    config = student_config("test_resnet", embedding_size=16, image_size=SIZE, text="64x1", context_length=8)
    student, results = build_student(config, name="student"), []
    for trunk in trunks:
        student.model.visual = first_layers(trunk)
        before = dict(student.model.get_submodule("visual").named_parameters())
        one, other = (trained(student, channels_last=channels_last) for channels_last in (True, False))
        results.append([largest_difference(one, other), largest_difference(before, other)])
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
