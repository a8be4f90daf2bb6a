"""Not a test: compute loss and gradients of one step, directly or under torchrun, and save them. See test_step.py."""

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


def make_model(seed: int, name: str):  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    config = student_config(name, embedding_size=16, image_size=160, text="tiny", context_length=8)
    return build_student(config, name=name)


def main(output: str, chunks: int, block: int, global_logits: int) -> None:
    torch.set_num_threads(1)
    with join_processes() as processes:
        # Models without batch norms, whose statistics would depend on how the batch is split.
        student, teacher = make_model(0, "test_vit"), make_model(1, "test_vit")
        objective = Objective(load_recipe("clip-rd").objective)
        settings = StepSettings(chunks=chunks, block=block, global_logits=bool(global_logits))
        live_teacher = Teacher(teacher, processes.device, autocast=None)
        step = TrainingStep(student, live_teacher, objective, processes, settings)
        pixels = torch.randint(256, (PAIRS, 3, 160, 160), generator=torch.Generator().manual_seed(2)).byte()
        size = PAIRS // processes.world_size
        local = slice(processes.rank * size, (processes.rank + 1) * size)
        result = step(Batch(pixels[local], pixels[local], CAPTIONS[local]), 0)
        parameters = [*student.model.named_parameters(), *objective.named_parameters()]
        gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
        if processes.is_main:
            torch.save({"loss": result.loss.total, "terms": result.loss.terms, "gradients": gradients}, output)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
