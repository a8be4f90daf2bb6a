"""Not a test: computes one step's loss and gradients, alone or under torchrun, and saves them. See test_step.py."""

from __future__ import annotations

import sys

import torch

from clip_rd_edge.distillation.config import load_recipe
from clip_rd_edge.distillation.distributed import join_processes
from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.step import StepSettings, TrainingStep
from clip_rd_edge.distillation.teacher import Teacher
from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.models.student import build_student, student_config

PAIRS = 8
CAPTIONS = ["a cat", "two dogs", "red", "a very blue sky", "0", "tea", "a boat at sea", "night"]


def model(seed: int, name: str):  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    config = student_config(name, embedding_size=16, image_size=160, text="tiny", context_length=8)
    return build_student(config, name=name)


def main(output: str, chunks: int, block: int, global_logits: int) -> None:
    torch.set_num_threads(1)
    with join_processes() as processes:
        # No batch norms: they would see other neighbours in another cut of the batch.
        student, teacher = model(0, "test_vit"), model(1, "test_vit")
        objective = Objective(load_recipe("clip-rd").objective)
        settings = StepSettings(chunks=chunks, block=block, global_logits=bool(global_logits))
        frozen = Teacher(teacher, processes.device, autocast=None)
        step = TrainingStep(student, frozen, objective, processes, settings)
        pixels = torch.rand(PAIRS, 3, 160, 160, generator=torch.Generator().manual_seed(2))
        own = slice(processes.rank * PAIRS // processes.count, (processes.rank + 1) * PAIRS // processes.count)
        result = step(Batch(pixels[own], pixels[own], CAPTIONS[own]), 0)
        named = [*student.model.named_parameters(), *objective.named_parameters()]
        gradients = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
        if processes.first:
            torch.save({"loss": result.loss.total, "terms": result.loss.terms, "gradients": gradients}, output)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
