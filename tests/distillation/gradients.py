"""Not a test: compute loss and gradients of steps, each twice, here or under torchrun. See test_step.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clip_rd_edge.distillation.config import load_recipe
from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.processes import Processes, join_processes
from clip_rd_edge.distillation.step import StepSettings, TrainingStep
from clip_rd_edge.distillation.store import QueueBank
from clip_rd_edge.distillation.teacher import LiveTeacher, Teacher
from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.models.students import build_student, student_config

PAIRS = 8
CAPTIONS = ["a cat", "two dogs", "red", "a very blue sky", "0", "tea", "a boat at sea", "night"]


def make_model(seed: int, name: str):  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    config = student_config(name, embedding_size=16, image_size=160, text="64x1", context_length=8)
    return build_student(config, name=name)


class Messages:
    """Counts the collective operations of torch.distributed."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        for name in ("all_reduce", "all_gather", "broadcast", "barrier"):
            setattr(dist, name, partial(self._count, name, getattr(dist, name)))

    def _count(self, name: str, send: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.counts[name] = self.counts.get(name, 0) + 1
        return send(*args, **kwargs)


def main(folder: Path, *cases: str) -> None:
    """Compute each case, such as `test_vit chunks=2 block=3 global_logits=0`, and write FOLDER/0.pt and so on."""
    torch.set_num_threads(1)
    messages = Messages()
    with join_processes() as processes:
        for number, case in enumerate(cases):
            name, *settings = case.split()
            chosen = {key: int(value) for key, value in (setting.split("=") for setting in settings)}
            results = two_steps(name, StepSettings(**chosen), processes, messages)
            if processes.is_main:
                torch.save(results, folder / f"{number}.pt")


def two_steps(name: str, settings: StepSettings, processes: Processes, messages: Messages) -> list[dict[str, Any]]:
    student, teacher = make_model(0, name), make_model(1, name)
    objective = Objective(load_recipe("clip-rd-bank").objective)
    live_teacher = LiveTeacher([Teacher(teacher, processes.device, autocast=None)])
    bank = QueueBank(PAIRS, processes.device)  # the same in both steps
    step = TrainingStep(student, live_teacher, objective, processes, settings, bank=bank)
    pixels = torch.randint(256, (PAIRS, 3, 160, 160), generator=torch.Generator().manual_seed(2)).byte()
    size = PAIRS // processes.world_size
    local = slice(processes.rank * size, (processes.rank + 1) * size)
    parameters = [*student.model.named_parameters(), *objective.named_parameters()]
    results = []
    for _ in range(2):
        for _, parameter in parameters:
            parameter.grad = None
        messages.counts.clear()
        result = step(Batch(pixels[local], (pixels[local],), CAPTIONS[local]), 0)
        gradients = {name: parameter.grad.clone() for name, parameter in parameters if parameter.grad is not None}
        record = {"loss": result.loss.total, "terms": result.loss.terms, "gradients": gradients}
        results.append({**record, "messages": dict(messages.counts)})
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
