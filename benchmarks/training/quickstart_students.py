"""Trains `resnet10t` in several ways with several seeds: what `unpaired.py` and `teachers.py` share."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import clip_rd_edge as edge
from benchmarks.publishing import add_output_options, here_and_now, publish, write_record
from clip_rd_edge.benchmarking.accuracy import evaluate
from clip_rd_edge.bundle.encoder import Encoder
from clip_rd_edge.data.tasks import load_task

TASKS = ("emoji:unseen-style", "emoji:unseen-concepts")
SETTINGS: dict[str, Any] = {
    "student": "resnet10t", "image_size": 64, "text": "tiny", "context_length": 16, "embedding_size": 384,
    "recipe": "clip-rd-bank", "pretrained_text": "tokens", "views": 5,
    "batch_size": 32, "learning_rate": 0.002, "precision": "bf16", "workers": 0, "checkpoint_every": 50,
}  # fmt: skip
Result = dict[str, Any]
# By way and seed: top-1 of each task, in percent.
Scores = dict[str, dict[int, list[float]]]


def parser_for(name: str, steps: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments that `train_all` needs; `name` is that of the table's markers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="of the students, which are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--precision", default=SETTINGS["precision"], help="fp32 on processors without AMX")
    parser.add_argument("--text", default=SETTINGS["text"], help="text tower, as for distill")
    frozen = parser.add_mutually_exclusive_group()
    frozen.add_argument("--freeze-text", action="store_true", help="train nothing of a text tower that has weights")
    frozen.add_argument(
        "--freeze-text-layers",
        type=int,
        default=0,
        metavar="N",
        help="train only what follows the first N groups of layers of such a tower",
    )
    parser.add_argument("--only", help="train in this way alone; default: in all")
    add_output_options(parser, name, required=True)
    return parser


def train_all(
    arguments: argparse.Namespace,
    ways: Mapping[str, Mapping[str, Any]],
    teachers: Mapping[str, Encoder],
    markdown: Callable[[Result], str],
) -> None:
    """Train a student in each way with each seed, but for those that the output has, and write the figures.

    Args:
        arguments: those of `parser_for`.
        ways: by name, what `edge.distill` gets beside SETTINGS, with `{seed}` in the path of a teacher's store.
        teachers: by name, the teachers to evaluate.
        markdown: returns the table.
    """
    settings = {**SETTINGS, "precision": arguments.precision, "text": arguments.text}
    if arguments.text != SETTINGS["text"]:  # it has weights
        settings |= {
            "pretrained_text": None,
            "freeze_text": arguments.freeze_text,
            "freeze_text_layers": arguments.freeze_text_layers,
        }
    if arguments.only:
        ways = {arguments.only: ways[arguments.only]}
    result: Result = {"steps": arguments.steps, "settings": settings, "runs": []}
    if arguments.output.is_file():
        result = json.loads(arguments.output.read_text(encoding="utf-8"))
    else:
        result["teachers"] = {name: top1(teacher) for name, teacher in teachers.items()}
    done = {(run["way"], run["seed"]) for run in result["runs"]}
    for seed, way in ((seed, way) for seed in arguments.seeds for way in ways if (way, seed) not in done):
        options = {**settings, **ways[way], "steps": arguments.steps, "seed": seed, "resume": True}
        if "store" in options:  # the crops of a seed are its own
            options["store"] = options["store"].format(seed=seed)
        run = edge.distill(output=run_folder(arguments, way, seed), **options)
        result["runs"].append({"way": way, "seed": seed, "top1": top1(edge.load(run).encoder)})
        result |= here_and_now()
        write_record(result, arguments.output)
        print(f"seed {seed}, {way}: {result['runs'][-1]['top1']}", flush=True)
    publish(result, markdown(result), arguments)


def run_folder(arguments: argparse.Namespace, way: str, seed: int) -> Path:
    """Return the folder of a student."""
    folder: Path = arguments.folder
    return folder / f"{'-'.join(way.replace(',', '').split())}-{seed}"


def top1(encoder: Encoder) -> dict[str, float]:
    """Return top-1 by task."""
    return {name: evaluate(encoder, load_task(name)).top1 for name in TASKS}  # type: ignore[union-attr]


def scores(result: Result) -> Scores:
    """Return the figures of the seeds that all ways have."""
    by_way: Scores = {}
    for run in result["runs"]:
        by_way.setdefault(run["way"], {})[run["seed"]] = [100 * run["top1"][task] for task in TASKS]
    common = sorted(set.intersection(*(set(runs) for runs in by_way.values())))
    return {way: {seed: runs[seed] for seed in common} for way, runs in by_way.items()}


def rows(result: Result, ahead: Mapping[str, str]) -> list[str]:
    """Return the rows of the table: the teachers, then each way's mean and deviation, and what `ahead` has of it."""
    lines = [
        f"| {name} | | {' | '.join(f'{100 * values[task]:.1f}' for task in TASKS)} | |"
        for name, values in result["teachers"].items()
    ]
    for way, runs in scores(result).items():
        columns = [plus_minus([values[task] for values in runs.values()]) for task in range(len(TASKS))]
        lines.append(f"| {way} | {len(runs)} | {' | '.join(columns)} | {ahead.get(way, '')} |")
    return lines


def plus_minus(values: list[float], digits: int = 1) -> str:
    """Return the mean, and with several values the standard deviation."""
    spread = [statistics.fmean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
    return " ± ".join(f"{value:.{digits}f}" for value in spread)
