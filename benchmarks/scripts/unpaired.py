"""What captions are worth: students of one teacher on pairs, on images and labels apart, and on half of the captions.

    export OMP_NUM_THREADS=1
    python benchmarks/scripts/unpaired.py unpaired --teacher quickstart/teacher --seeds 0 1 2 3 4 \\
        -o benchmarks/results/MACHINE/unpaired.json --readme benchmarks/README.md

Settings and steps are the quickstart's. Each concept of the built-in data has its name as its only caption, and the
list of labels has all these names. An interrupted call goes on; finished students are in the folder.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from quickstart_students import Result, parser_for, plus_minus, rows, scores, train_all

import clip_rd_edge as edge
from clip_rd_edge.data import emoji

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
    (folder / "labels.txt").write_text("\n".join(dict.fromkeys(name for _, name in rows)) + "\n", encoding="utf-8")
    return {
        PAIRS: {"data": folder / "pairs.csv"},
        "all images, no caption, list of labels": {"images": folder / "pairs.csv", "texts": folder / "labels.txt"},
        "all images, half of the captions": {"data": folder / "half.csv", "images": folder / "rest.csv"},
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


def main() -> None:
    parser = parser_for("unpaired", steps=1100)
    parser.add_argument("--teacher", type=Path, required=True)
    arguments = parser.parse_args()
    ways = {}
    for number, (name, data) in enumerate(write_data(arguments.folder).items()):
        cache = str(arguments.folder / f"embeddings-{number}-{{seed}}")
        ways[name] = {"teacher": arguments.teacher, "teacher_cache": cache, **data}
    train_all(arguments, ways, {"teacher": edge.load(arguments.teacher).encoder}, markdown)


if __name__ == "__main__":
    main()
