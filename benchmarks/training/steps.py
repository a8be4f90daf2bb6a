"""Compare training steps of a student with those that are computed in another way, in turn in one process.

    python -m benchmarks.training.steps compiled resnet18 mobilevit_s
    python -m benchmarks.training.steps whole-contexts resnet10t resnet18 --text standard \\
        -o benchmarks/results/MACHINE/captions.json
    python -m benchmarks.training.steps pass-per-length resnet10t mobilevit_xxs --image-size 64 --text tiny \\
        --batch-size 32
    python -m benchmarks.training.steps torch-depthwise efficientnet_lite0 --image-size 64 --text tiny --batch-size 64

`compiled` runs the towers through torch.compile, `whole-contexts` computes all 77 positions of every caption,
`pass-per-length` joins no captions of different lengths, and `torch-depthwise` leaves the gradients of all depthwise
convolutions to torch. Captions are the definitions of ImageNet's classes, which are about as long as captions of the
web. One thread, no teacher; times are of the clock, ratios medians over the steps with their 10th and 90th percentiles.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from open_clip import SimpleTokenizer
from timm.data import ImageNetInfo

from benchmarks.publishing import here_and_now, print_record
from clip_rd_edge.distillation import depthwise
from clip_rd_edge.distillation.config import load_recipe
from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.step import StepSettings, TrainingStep
from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.models.clip import TextTower, default_device, to_device
from clip_rd_edge.models.encoder import CaptionTower
from clip_rd_edge.models.students import build_student, student_config


def definitions() -> list[str]:
    """Return the definitions of ImageNet's 21,841 classes in random order."""
    info = ImageNetInfo("imagenet-22k")
    names = [str(info.index_to_description(index, detailed=True)) for index in range(info.num_classes())]
    texts = [name.partition(":")[2].strip() for name in names if ":" in name]
    return [texts[row] for row in np.random.default_rng(0).permutation(len(texts))]


class PassPerLength(CaptionTower):
    def passes(self, input_ids: torch.Tensor) -> list[tuple[int, list[int]]]:
        return list(self.rows_by_length(input_ids).items())


def compare(name: str, captions: Sequence[str], arguments: argparse.Namespace) -> dict[str, object]:
    size, processes = arguments.batch_size, Processes(device=default_device())
    objective = Objective(load_recipe("clip").objective).to(processes.device)
    config = student_config(name, embedding_size=512, image_size=arguments.image_size, text=arguments.text)
    student = build_student(config, name=name)
    to_device(student.model, processes.device).train()
    other = replace(student, model=copy.deepcopy(student.model))
    compiled = StepSettings(compile=arguments.way == "compiled")
    steps = {
        "plain": TrainingStep(student, None, objective, processes, StepSettings()),
        arguments.way: TrainingStep(other, None, objective, processes, compiled),
    }
    if arguments.way == "whole-contexts":
        steps[arguments.way]._text_tower = CaptionTower(TextTower(other.model), other.model, choices=())
    if arguments.way == "pass-per-length":
        steps[arguments.way]._text_tower = PassPerLength(TextTower(other.model), other.model)
    if arguments.way == "torch-depthwise":
        for module in other.model.modules():
            if isinstance(module, depthwise._DepthwiseConvolution):
                module.__class__ = torch.nn.Conv2d
    pixels = torch.randint(256, (size, 3, arguments.image_size, arguments.image_size)).byte()
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(arguments.steps + 1):
        batch = Batch(pixels, (), [captions[(number * size + row) % len(captions)] for row in range(size)])
        for way, step in steps.items():
            start = time.perf_counter()
            step(batch, number).loss.total.item()
            seconds[way].append(time.perf_counter() - start)
            step.student.model.zero_grad(set_to_none=True)
    ratios = np.asarray(seconds["plain"][1:]) / np.asarray(seconds[arguments.way][1:])
    low, high = np.percentile(ratios, [10, 90])
    return {
        "student": name,
        "text": arguments.text,
        "image_size": arguments.image_size,
        "batch_size": size,
        "seconds": {way: statistics.median(times[1:]) for way, times in seconds.items()},
        "first_step_seconds": seconds[arguments.way][0],
        "ratio": {"median": float(np.median(ratios)), "low": float(low), "high": float(high)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare training steps with those computed in another way.")
    parser.add_argument("way", choices=["compiled", "whole-contexts", "pass-per-length", "torch-depthwise"])
    parser.add_argument("students", nargs="+")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--text", default="small")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    captions = definitions()
    lengths = SimpleTokenizer()(captions).argmax(dim=1) + 1
    rows = [compare(name, captions, arguments) for name in arguments.students]
    result = {
        **here_and_now(),
        "way": arguments.way,
        "tokens": {str(q): float(np.percentile(lengths, q)) for q in (5, 50, 95, 100)},
        "students": rows,
    }
    print_record(result, arguments.output)


if __name__ == "__main__":
    main()
