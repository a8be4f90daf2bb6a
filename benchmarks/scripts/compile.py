"""Not a test: steps of a student as it is against steps through torch.compile, in turn in one process.

python benchmarks/scripts/compile.py resnet18 mobilevit_s
python benchmarks/scripts/compile.py resnet18 --image-size 64 --batch-size 32 --steps 10
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from clip_rd_edge.distillation.config import load_recipe
from clip_rd_edge.distillation.distributed import Processes
from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.step import StepSettings, TrainingStep
from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.models.clip import default_device, to_device
from clip_rd_edge.models.student import build_student, student_config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("students", nargs="+")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    pixels = torch.rand(given.batch_size, 3, given.image_size, given.image_size)
    batch = Batch(pixels, None, [f"picture number {i}" for i in range(given.batch_size)])
    processes = Processes(device=default_device())
    objective = Objective(load_recipe("clip").objective).to(processes.device)
    for name in given.students:
        config = student_config(name, embedding_size=512, image_size=given.image_size, text="small")
        student = build_student(config, name=name)
        to_device(student.model, processes.device).train()
        other = replace(student, model=copy.deepcopy(student.model))
        steps = {
            "eager": TrainingStep(student, None, objective, processes, StepSettings()),
            "compiled": TrainingStep(other, None, objective, processes, StepSettings(compile=True)),
        }
        seconds: dict[str, list[float]] = {way: [] for way in steps}
        first = dict[str, float]()
        for number in range(given.steps + 1):
            for way, step in steps.items():
                began = time.perf_counter()
                step(batch, number).loss.total.item()
                took = time.perf_counter() - began
                if number:
                    seconds[way].append(took)
                else:
                    first[way] = took
                step.student.model.zero_grad(set_to_none=True)
        eager, compiled = (statistics.median(seconds[way]) for way in steps)
        low, high = np.percentile(np.asarray(seconds["eager"]) / np.asarray(seconds["compiled"]), [10, 90])
        print(
            f"{name}, {given.image_size} pixels, batch {given.batch_size}, {processes.device.type}: eager "
            f"{eager * 1e3:.0f} ms a step, compiled {compiled * 1e3:.0f} ms, {eager / compiled:.2f}× the steps "
            f"({low:.2f} to {high:.2f}); the first compiled step took {first['compiled']:.0f} s"
        )


if __name__ == "__main__":
    main()
