"""Compare training steps of a student in eager mode and through torch.compile, in turn in one process.

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
from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.processes.distributed import Processes
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
    args = parser.parse_args()
    pixels = torch.randint(256, (args.batch_size, 3, args.image_size, args.image_size)).byte()
    batch = Batch(pixels, (), [f"image number {i}" for i in range(args.batch_size)])
    processes = Processes(device=default_device())
    objective = Objective(load_recipe("clip").objective).to(processes.device)
    for name in args.students:
        config = student_config(name, embedding_size=512, image_size=args.image_size, text="small")
        student = build_student(config, name=name)
        to_device(student.model, processes.device).train()
        copied = replace(student, model=copy.deepcopy(student.model))
        steps = {
            "eager": TrainingStep(student, None, objective, processes, StepSettings()),
            "compiled": TrainingStep(copied, None, objective, processes, StepSettings(compile=True)),
        }
        seconds: dict[str, list[float]] = {mode: [] for mode in steps}
        first = dict[str, float]()
        for number in range(args.steps + 1):
            for mode, step in steps.items():
                start = time.perf_counter()
                step(batch, number).loss.total.item()
                duration = time.perf_counter() - start
                if number:
                    seconds[mode].append(duration)
                else:
                    first[mode] = duration
                step.student.model.zero_grad(set_to_none=True)
        eager, compiled = (statistics.median(seconds[mode]) for mode in steps)
        low, high = np.percentile(np.asarray(seconds["eager"]) / np.asarray(seconds["compiled"]), [10, 90])
        print(
            f"{name}, {args.image_size} pixels, batch {args.batch_size}, {processes.device.type}: eager "
            f"{eager * 1e3:.0f} ms per step, compiled {compiled * 1e3:.0f} ms, {eager / compiled:.2f}× as fast "
            f"({low:.2f} to {high:.2f}); the first compiled step took {first['compiled']:.0f} s"
        )


if __name__ == "__main__":
    main()
