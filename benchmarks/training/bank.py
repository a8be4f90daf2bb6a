"""Compare training steps of CLIP-RD with and without relations to a bank of the teacher's embeddings, in turn.

    export OMP_NUM_THREADS=1
    python -m benchmarks.training.bank resnet10t@64 --text tiny -o benchmarks/results/MACHINE/bank-cost.json
    python -m benchmarks.training.bank vit_tiny_16@224 resnet18@224 --batch-size 32 \\
        -o benchmarks/results/MACHINE/bank-cost.json --readme benchmarks/measurements/bank-cost.md
    python -m benchmarks.training.bank resnet18@224 --accumulate 8 --rounds 3 \\
        -o benchmarks/results/MACHINE/bank-cost.json --readme benchmarks/measurements/bank-cost.md

Times are of the processor, without those of the loader, the optimiser and a live teacher: the teacher's embeddings come
from memory, as from a store. Images and embeddings are random. The additional memory is by how much the peak of
the process grows when steps with the bank begin, the bank included.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.publishing import add_output_options, publish
from clip_rd_edge.distillation.config import load_recipe
from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.step import AUTOCAST, StepSettings, TrainingStep
from clip_rd_edge.distillation.teacher import StoredTeacher
from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.losses.terms import Bank, Ensemble
from clip_rd_edge.models.clip import to_device
from clip_rd_edge.models.students import build_student, student_config

CPU = torch.device("cpu")
TEACHER_SCALE = 100.0


class FixedBank:
    """Random embeddings in place of those of a teacher's store."""

    def __init__(self, entries: int, width: int) -> None:
        self._bank = Bank(random_rows(entries, width), random_rows(entries, width))

    def with_batch(self, image: Tensor, text: Tensor) -> Bank:
        return self._bank

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        pass


def random_rows(count: int, width: int) -> Tensor:
    return normalize(torch.randn(count, width), dim=-1)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(student_name: str, image_size: int, arguments: argparse.Namespace) -> dict[str, object]:
    size, width = arguments.batch_size, arguments.width
    torch.manual_seed(0)
    config = student_config(student_name, embedding_size=width, image_size=image_size, text=arguments.text)
    student = build_student(config, name=student_name)
    to_device(student.model, CPU).train()
    pixels = torch.randint(256, (size, 3, image_size, image_size)).byte()
    embeddings = random_rows(size, width).half(), random_rows(size, width).half()
    captions = [f"image number {number}" for number in range(size)]
    batch = Batch(pixels, (), captions, teacher_embeddings=embeddings)
    teacher = StoredTeacher(Ensemble((width,), (TEACHER_SCALE,)), CPU)
    settings = StepSettings(autocast=AUTOCAST[arguments.precision], chunks=arguments.accumulate)

    def step(recipe: str, bank: FixedBank | None) -> None:
        objective = Objective(load_recipe(recipe).objective)
        TrainingStep(student, teacher, objective, Processes(), settings, bank=bank)(batch, 0)
        student.model.zero_grad(set_to_none=True)

    step("clip-rd", None)
    before = peak_mib()
    calls = {
        "clip-rd": partial(step, "clip-rd", None),
        "clip-rd-bank": partial(step, "clip-rd-bank", FixedBank(arguments.entries, width)),
    }
    calls["clip-rd-bank"]()
    grown = peak_mib() - before
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            samples[name].append(time.process_time() - start)
    ratios = np.asarray(samples["clip-rd-bank"]) / np.asarray(samples["clip-rd"])
    return {
        "student": f"{student_name}, {image_size} pixels",
        "precision": arguments.precision,
        "text": arguments.text,
        "batch_size": size,
        "accumulate": arguments.accumulate,
        "seconds": {name: round(float(np.median(values)), 2) for name, values in samples.items()},
        "ratio": [round(float(value), 3) for value in (np.median(ratios), ratios.min(), ratios.max())],
        "peak_growth_mib": round(grown),
    }


def markdown(rows: list[dict[str, object]]) -> str:
    lines = [
        "| student | text tower | pairs | CLIP-RD, s per step | with the bank, s | ratio | peak memory |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        seconds, (middle, low, high) = row["seconds"], row["ratio"]  # type: ignore[misc]
        lines.append(
            f"| {row['student']} | {row['text']} | {row['batch_size']} | {seconds['clip-rd']:.2f} | "  # type: ignore[index]
            f"{seconds['clip-rd-bank']:.2f} | {middle:.2f} ({low:.2f} to {high:.2f}) | "  # type: ignore[index,has-type]
            f"+{row['peak_growth_mib']} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("students", nargs="+", metavar="NAME@PIXELS")
    parser.add_argument("--entries", type=int, default=65_536, help="images, and captions, in the bank")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--text", default="standard")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    add_output_options(parser, "bank-cost", required=True)
    arguments = parser.parse_args()
    rows = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"] if arguments.output.is_file() else []
    for name in arguments.students:
        student, _, pixels = name.partition("@")
        rows.append(measure(student, int(pixels), arguments))
        sizes = {key: getattr(arguments, key) for key in ("entries", "width")}
        result = {**sizes, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        publish(result, markdown(rows), arguments)


if __name__ == "__main__":
    main()
