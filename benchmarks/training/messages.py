"""Count the messages of a training step on several processes, and how much of them the backward pass hides.

    python -m benchmarks.training.messages -o benchmarks/results/MACHINE/messages.json \\
        --readme benchmarks/measurements/messages.md

A run of `distill` on noise images is started by torchrun, and torch's profiler watches some of its steps in the first
process, from the status message of one to that of another: what is counted is what a run sends. A message lasts from
when it is handed to gloo until it is complete. It is hidden while the first process computes gradients of layers.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.publishing import add_output_options, here_and_now, publish

WARM_UP_STEPS = 3
PREFIX = "gloo:"  # of the profiler's names of messages
GRADIENTS = "autograd::engine::evaluate_function"


class Interval(NamedTuple):
    """From when to when, in microseconds."""

    start: float
    stop: float


def main() -> None:
    parser = argparse.ArgumentParser(description="Count messages per step, and how much of them is hidden.")
    add_output_options(parser, "messages")
    parser.add_argument("--students", nargs="+", default=["resnet50", "mobilevit_s"])
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together (default: 32)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=5, help="to watch (default: 5)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments)
        return
    record: dict[str, Any] = {
        **here_and_now(),
        "processes": arguments.processes,
        "batch_size": arguments.batch_size,
        "image_size": arguments.image_size,
        "students": {student: watch(student, arguments) for student in arguments.students},
    }
    publish(record, table(record), arguments)


def watch(student: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a student's steps, from processes that torchrun starts."""
    with tempfile.TemporaryDirectory() as name:
        write_pairs(Path(name), arguments.batch_size)
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.processes)]
        options = ["--batch-size", str(arguments.batch_size), "--image-size", str(arguments.image_size)]
        options += ["--steps", str(arguments.steps), "--students", student]
        subprocess.run(
            [sys.executable, "-m", *launcher, "-m", "benchmarks.training.messages", "--worker", name, *options],
            env={"OMP_NUM_THREADS": "1", **os.environ},
            check=True,
        )
        figures: dict[str, Any] = json.loads((Path(name) / "figures.json").read_text())
    return figures


def write_pairs(folder: Path, count: int) -> None:
    """Write noise images and their table."""
    rng = np.random.default_rng(0)
    with (folder / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("filepath", "title"))
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (240, 320, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
            rows.writerow((f"{i}.jpg", f"image number {i}"))


def work(folder: Path, arguments: argparse.Namespace) -> None:
    """Train in one of the processes; the first one profiles its steps and writes what it saw."""
    import clip_rd_edge as edge

    class Profiled(edge.Reporter):
        """Profiles the steps after the warm-up; only the first process is told of steps."""

        def __init__(self) -> None:
            from torch.profiler import ProfilerActivity, profile

            self._profile = profile(activities=[ProfilerActivity.CPU])

        def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
            if stage != "training":
                return
            if step == WARM_UP_STEPS:
                self._profile.start()
            elif step == WARM_UP_STEPS + arguments.steps:
                self._profile.stop()
                figures = summarise(self._profile.events(), arguments.steps)
                (folder / "figures.json").write_text(json.dumps(figures))

    edge.distill(
        data=str(folder / "pairs.csv"),
        student=arguments.students[0],
        recipe="clip",
        output=folder / "run",
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        steps=WARM_UP_STEPS + arguments.steps + 1,
        precision="fp32",
        checkpoint_every=1000,
        reporter=Profiled(),
    )


def summarise(events: Iterable[Any], steps: int) -> dict[str, Any]:
    """Return messages per step, and the time that they take and that is hidden, in milliseconds per step.

    Args:
        events: the profiler's, with a name and a time_range in microseconds.
    """
    events = list(events)
    messages = [event for event in events if event.name.startswith(PREFIX)]
    gradients = union(span(event) for event in events if event.name.startswith(GRADIENTS))
    sending = union(map(span, messages))
    counts = Counter(event.name.removeprefix(PREFIX) for event in messages)
    return {
        "messages_per_step": {name: count / steps for name, count in sorted(counts.items())},
        "messages_ms": length(sending) / steps / 1e3,
        "backward_ms": length(gradients) / steps / 1e3,
        "hidden_ms": length(intersection(sending, gradients)) / steps / 1e3,
        "longest_message_ms": max((e.time_range.end - e.time_range.start) / 1e3 for e in messages),
        "median_message_ms": statistics.median((e.time_range.end - e.time_range.start) / 1e3 for e in messages),
    }


def span(event: Any) -> Interval:
    return Interval(event.time_range.start, event.time_range.end)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return disjoint intervals that cover the same, in order."""
    merged: list[Interval] = []
    for interval in sorted(intervals):
        if merged and interval.start <= merged[-1].stop:
            merged[-1] = Interval(merged[-1].start, max(merged[-1].stop, interval.stop))
        else:
            merged.append(interval)
    return merged


def intersection(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """Return what two lists of disjoint intervals have in common."""
    common, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, stop = max(first[i].start, second[j].start), min(first[i].stop, second[j].stop)
        if start < stop:
            common.append(Interval(start, stop))
        if first[i].stop < second[j].stop:
            i += 1
        else:
            j += 1
    return common


def length(intervals: list[Interval]) -> float:
    return sum(interval.stop - interval.start for interval in intervals)


def table(record: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    rows = [
        "| student | messages a step | of which | time of messages | hidden by the backward pass | backward pass |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for student, figures in record["students"].items():
        counts = figures["messages_per_step"]
        kinds = ", ".join(f"{count:g} {name}" for name, count in counts.items())
        share = figures["hidden_ms"] / figures["messages_ms"]
        rows.append(
            f"| {student} | {sum(counts.values()):g} | {kinds} | {figures['messages_ms']:.0f} ms | {share:.0%} | "
            f"{figures['backward_ms']:.0f} ms |"
        )
    text = (
        f"{record['processes']} processes with gloo, {record['batch_size']} pairs in all, "
        f"{record['image_size']} pixels, float32; {record['machine']}, {record['date']}."
    )
    return "\n".join([*rows, "", text])


if __name__ == "__main__":
    main()
