"""What captions are worth: students of one teacher on pairs, on images and labels apart, and on half of the captions.

    export OMP_NUM_THREADS=1
    python -m benchmarks.training.unpaired unpaired --teacher quickstart/teacher --seeds 0 1 2 3 4 \\
        -o benchmarks/results/MACHINE/unpaired.json --readme benchmarks/measurements/captions.md

Each concept of the built-in data has its name as its only caption, and the list of labels has all these names. So half
of the captions lack many names altogether: a second table has the top-1 on the names that they have, and on the others.
An interrupted call goes on; finished students are in the folder.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np

import clip_rd_edge as edge
from benchmarks.publishing import publish
from benchmarks.training.quickstart_students import (
    TASKS,
    Result,
    parser_for,
    plus_minus,
    rows,
    run_folder,
    scores,
    train_all,
)
from clip_rd_edge.benchmarking.accuracy import zero_shot
from clip_rd_edge.benchmarking.metrics import Hits
from clip_rd_edge.data import emoji
from clip_rd_edge.data.tasks import ZeroShotTask, load_task

PAIRS = "all pairs"


def write_data(folder: Path) -> dict[str, dict[str, Path]]:
    """Write the tables and the labels; return the data of each way to train."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = emoji.training_pairs()
    rows = [(str(path), captions[0]) for path, captions in zip(pairs.images, pairs.texts, strict=True)]
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    half = [rows[index] for index in sorted(order[: len(rows) // 2])]
    captioned = dict(half)
    rest = [(path, "") for path, _ in rows if path not in captioned]
    for name, table in (("pairs", rows), ("half", half), ("rest", rest)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("filepath", "title"), *table])
    half_captioned = {"data": folder / "half.csv", "images": folder / "rest.csv"}
    (folder / "labels.txt").write_text("\n".join(dict.fromkeys(name for _, name in rows)) + "\n", encoding="utf-8")
    return {
        PAIRS: {"data": folder / "pairs.csv"},
        "all images, no caption, list of labels": {"images": folder / "pairs.csv", "texts": folder / "labels.txt"},
        "all images, half of the captions": half_captioned,
        "all images, half of the captions, list of labels": {**half_captioned, "texts": folder / "labels.txt"},
        "half of the pairs, nothing else": {"data": folder / "half.csv"},
    }


def markdown(result: Result) -> str:
    """Return the figures of each way, and the share of what all pairs reach."""
    by_way, shares = scores(result), {}
    for way, runs in by_way.items():
        of_pairs = [100 * sum(runs[seed]) / sum(by_way[PAIRS][seed]) for seed in runs]
        shares[way] = "" if way == PAIRS else f"{plus_minus(of_pairs, digits=0)} %"
    head = [
        "| trained on | seeds | unseen style, top-1 | unseen concepts, top-1 | of what all pairs reach, both tasks |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join(head + rows(result, shares))


def publish_names(arguments: argparse.Namespace) -> None:
    """Write the top-1 of the finished students on the unseen style, by whether half of the captions have the name."""
    with (arguments.folder / "half.csv").open(encoding="utf-8", newline="") as file:
        kept = {row["title"] for row in csv.DictReader(file)}
    task = load_task(TASKS[0])
    assert isinstance(task, ZeroShotTask)
    result = json.loads(arguments.output.read_text(encoding="utf-8"))
    for run in result["runs"]:
        encoder = edge.load(run_folder(arguments, run["way"], run["seed"])).encoder
        run["by_name"] = top1_by_name(zero_shot(encoder, task).hits(task), task, kept)
    arguments.marker += "-names"
    publish(result, names_markdown(result), arguments)


def top1_by_name(hits: Hits, task: ZeroShotTask, kept: set[str]) -> dict[str, float]:
    """Return the top-1 on the images whose name is in `kept`, and on the others."""
    in_kept = np.array([task.labels[target] in kept for target in task.targets])
    return {"kept": float(hits[in_kept].mean()), "lost": float(hits[~in_kept].mean())}


def names_markdown(result: Result) -> str:
    """Return the top-1 of each way by name, over the seeds that all ways have."""
    lines = [
        "| trained on | names that half of the captions have | other names |",
        "| --- | ---: | ---: |",
    ]
    for way, runs in scores(result).items():
        of_way = [run["by_name"] for run in result["runs"] if run["way"] == way and run["seed"] in runs]
        columns = [plus_minus([100 * run[names] for run in of_way]) for names in ("kept", "lost")]
        lines.append(f"| {way} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_for("unpaired", steps=1100)
    parser.add_argument("--teacher", type=Path, required=True)
    arguments = parser.parse_args()
    ways = {}
    for number, (name, data) in enumerate(write_data(arguments.folder).items()):
        cache = str(arguments.folder / f"embeddings-{number}-{{seed}}")
        ways[name] = {"teacher": arguments.teacher, "store": cache, **data}
    train_all(arguments, ways, {"teacher": edge.load(arguments.teacher).encoder}, markdown)
    publish_names(arguments)


if __name__ == "__main__":
    main()
