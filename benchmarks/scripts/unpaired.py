"""What captions are worth: students of one teacher on pairs, on images and labels apart, and on half of the captions.

    export OMP_NUM_THREADS=1
    python benchmarks/scripts/unpaired.py unpaired --teacher quickstart/teacher --seeds 0 1 2 \\
        -o benchmarks/results/MACHINE/unpaired.json --readme benchmarks/README.md

Settings are the quickstart's, with half of its steps. Each concept of the built-in data has its name as its only
caption, and the list of labels has all these names. An interrupted call goes on; finished students are in the folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

import clip_rd_edge as edge
from clip_rd_edge.benchmarking.report.text import write_between_markers
from clip_rd_edge.data import emoji
from clip_rd_edge.utils.host import machine_name

TASKS = ("emoji:unseen-style", "emoji:unseen-concepts")
PAIRS = "all pairs"
QUICKSTART: dict[str, Any] = {
    "student": "resnet10t", "image_size": 64, "text": "tiny", "context_length": 16, "embedding_size": 256,
    "batch_size": 32, "learning_rate": 0.002, "precision": "bf16", "workers": 0, "checkpoint_every": 50,
}  # fmt: skip


def write_data(folder: Path) -> dict[str, dict[str, Path]]:
    """Write the tables and the labels; return the data of each way to train."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = emoji.training_pairs()
    rows = [(str(path), captions[0]) for path, captions in zip(pairs.images, pairs.texts, strict=True)]
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    half = [rows[index] for index in sorted(order[: len(rows) // 2])]
    rest = [(path, "") for path, _ in rows if path not in {path for path, _ in half}]
    for name, table in (("pairs", rows), ("half", half), ("rest", rest)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("filepath", "title"), *table])
    (folder / "labels.txt").write_text("\n".join(dict.fromkeys(name for _, name in rows)) + "\n", encoding="utf-8")
    return {
        PAIRS: {"data": folder / "pairs.csv"},
        "all images, no caption, list of labels": {"images": folder / "pairs.csv", "texts": folder / "labels.txt"},
        "all images, half of the captions": {"data": folder / "half.csv", "images": folder / "rest.csv"},
        "half of the pairs, nothing else": {"data": folder / "half.csv"},
    }


def markdown(result: dict[str, Any]) -> str:
    """Return mean and standard deviation over the seeds that all ways have, and the share of what all pairs reach."""
    by_way: dict[str, dict[int, list[float]]] = {}
    for run in result["runs"]:
        by_way.setdefault(run["data"], {})[run["seed"]] = [100 * run["top1"][task] for task in TASKS]
    seeds = sorted(set.intersection(*(set(runs) for runs in by_way.values())))
    lines = [
        "| trained on | seeds | unseen style, top-1 | unseen concepts, top-1 | of what all pairs reach, both tasks |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| teacher | | " + " | ".join(f"{100 * result['teacher'][task]:.1f}" for task in TASKS) + " | |",
    ]
    for way, runs in by_way.items():
        columns = [" ± ".join(f"{value:.1f}" for value in spread([runs[seed][i] for seed in seeds])) for i in (0, 1)]
        shares = [100 * sum(runs[seed]) / sum(by_way[PAIRS][seed]) for seed in seeds]
        share = "" if way == PAIRS else " ± ".join(f"{value:.0f}" for value in spread(shares)) + " %"
        lines.append(f"| {way} | {len(seeds)} | {' | '.join(columns)} | {share} |")
    return "\n".join(lines)


def spread(values: list[float]) -> list[float]:
    """Return the mean, and with several values the standard deviation."""
    return [statistics.fmean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]


def scores(model: str | Path) -> dict[str, float]:
    """Return top-1 by task."""
    return dict(zip(TASKS, (score.top1 for score in edge.evaluate(model, TASKS)), strict=True))  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=550)
    parser.add_argument("-o", "--output", type=Path, required=True, help="a run that it has already is kept")
    parser.add_argument("--readme", type=Path, help="replace the table between <!-- unpaired: begin --> and its end")
    arguments = parser.parse_args()
    ways = write_data(arguments.folder)
    result: dict[str, Any] = {"steps": arguments.steps, "settings": QUICKSTART, "runs": []}
    if arguments.output.is_file():
        result = json.loads(arguments.output.read_text(encoding="utf-8"))
    else:
        result["teacher"] = scores(arguments.teacher)
    done = {(run["data"], run["seed"]) for run in result["runs"]}
    for seed in arguments.seeds:
        for way, data in ways.items():
            if (way, seed) in done:
                continue
            run = edge.distill(
                output=arguments.folder / f"{'-'.join(way.replace(',', '').split())}-{seed}", teacher=arguments.teacher,
                steps=arguments.steps, seed=seed, resume=True, **data, **QUICKSTART,
            )  # fmt: skip
            result["runs"].append({"data": way, "seed": seed, "top1": scores(run)})
            result |= {"machine": machine_name(), "date": date.today().isoformat()}
            arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"seed {seed}, {way}: {result['runs'][-1]['top1']}", flush=True)
    print(markdown(result))
    if arguments.readme:
        write_between_markers(arguments.readme, "unpaired", markdown(result))


if __name__ == "__main__":
    main()
