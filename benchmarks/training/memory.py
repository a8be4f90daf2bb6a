"""Compare training steps that keep freed memory with those that leave it to the C library, process by process in turn.

    python -m benchmarks.training.memory resnet10t mobilevit_xxs -o benchmarks/results/MACHINE/memory.json

What a step gains depends on what the system asks for a page: least without virtualisation. One thread, no teacher.
Seconds of the clock and of the system are those of a round's median step, of which the median over the rounds is given.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import statistics
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.publishing import here_and_now, print_record
from benchmarks.training.steps import definitions
from clip_rd_edge.distillation.config import load_recipe
from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.step import StepSettings, TrainingStep
from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.models.clip import to_device
from clip_rd_edge.models.students import build_student, student_config
from clip_rd_edge.utils.host import FREED_MEMORY_KEPT

WAYS = ("kept", "left to the C library")
WARM_UP = 5


class Step(NamedTuple):
    seconds: float
    system_seconds: float
    page_faults: float


def measure(way: str, name: str, arguments: argparse.Namespace) -> Step:
    """Return the median over the steps of a training."""
    torch.set_num_threads(1)
    size, device, captions = arguments.batch_size, torch.device("cpu"), definitions()
    objective = Objective(load_recipe("clip").objective)
    config = student_config(name, embedding_size=384, image_size=arguments.image_size, text=arguments.text)
    student = build_student(config, name=name)
    to_device(student.model, device).train()
    compute = TrainingStep(student, None, objective, Processes(device=device), StepSettings())
    optimizer = torch.optim.AdamW(student.model.parameters(), fused=True)
    pixels = torch.randint(256, (size, 3, arguments.image_size, arguments.image_size)).byte()
    readings = [reading()]
    with FREED_MEMORY_KEPT if way == WAYS[0] else nullcontext():
        for step in range(WARM_UP + arguments.steps):
            compute(Batch(pixels, (), captions[step * size : (step + 1) * size]), step).loss.total.item()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            readings.append(reading())
    steps = [Step(*(b - a for a, b in zip(*pair, strict=True))) for pair in itertools.pairwise(readings)]
    return Step(*map(statistics.median, zip(*steps[WARM_UP:], strict=True)))


def reading() -> Step:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Step(time.perf_counter(), usage.ru_stime, usage.ru_minflt)


def compare(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    rounds: dict[str, list[Step]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way, steps in rounds.items():
            # A new process each: the C library adapts to what was freed.
            with multiprocessing.get_context("spawn").Pool(1) as process:
                steps.append(process.apply(partial(measure, way, name, arguments)))
    kept, left = rounds.values()
    ratios = [b.seconds / a.seconds for a, b in zip(kept, left, strict=True)]
    return {
        "student": name,
        "text": arguments.text,
        "image_size": arguments.image_size,
        "batch_size": arguments.batch_size,
        "ways": {way: Step(*map(statistics.median, zip(*s, strict=True)))._asdict() for way, s in rounds.items()},
        "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare training steps that keep freed memory with others.")
    parser.add_argument("students", nargs="+")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--text", default="tiny")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows = [compare(name, arguments) for name in arguments.students]
    print_record({**here_and_now(), "students": rows}, arguments.output)


if __name__ == "__main__":
    main()
