"""What captions are worth: the data of each way to train, and the table."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks.training import unpaired
from benchmarks.training.quickstart_students import TASKS
from clip_rd_edge.data.tables import TablePairs
from clip_rd_edge.data.tasks import ZeroShotTask


def read(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def test_half_of_the_captions_and_the_other_images_are_all_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tuple(tmp_path / f"{number}.png" for number in range(9))
    captions = tuple((f"name {number // 2}", "an alias") for number in range(9))
    monkeypatch.setattr(unpaired.emoji, "training_pairs", lambda: TablePairs("emoji", images, captions))
    ways = unpaired.write_data(tmp_path / "data")
    pairs, half, rest = (read(tmp_path / "data" / f"{name}.csv") for name in ("pairs", "half", "rest"))
    assert (len(pairs), len(half), len(rest)) == (9, 4, 5)
    assert sorted(path for path, _ in half + rest) == sorted(path for path, _ in pairs)
    assert {caption for _, caption in rest} == {""}
    assert (tmp_path / "data" / "labels.txt").read_text().split("\n")[:5] == [f"name {number}" for number in range(5)]
    assert [sorted(data) for data in ways.values()] == [
        ["data"], ["images", "texts"], ["data", "images"], ["data", "images", "texts"], ["data"]
    ]  # fmt: skip


def test_shares_are_of_the_same_seed_and_seeds_that_one_way_lacks_are_left_out() -> None:
    def run(way: str, seed: int, style: float, concepts: float) -> dict[str, object]:
        return {"way": way, "seed": seed, "top1": dict(zip(TASKS, (style, concepts), strict=True))}

    runs = [run(unpaired.PAIRS, seed, 0.3, 0.1) for seed in (0, 1, 2)]
    runs += [run("labels", 0, 0.3, 0.06), run("labels", 1, 0.27, 0.09)]
    table = unpaired.markdown({"teachers": {"teacher": dict.fromkeys(TASKS, 0.4)}, "runs": runs}).splitlines()
    assert table[2] == "| teacher | | 40.0 | 40.0 | |"
    assert table[3] == f"| {unpaired.PAIRS} | 2 | 30.0 ± 0.0 | 10.0 ± 0.0 |  |"
    assert table[4] == "| labels | 2 | 28.5 ± 2.1 | 7.5 ± 2.1 | 90 ± 0 % |"


def test_accuracy_is_told_apart_by_whether_half_of_the_captions_have_the_name() -> None:
    task = ZeroShotTask(name="emoji", images=(Path("image.png"),) * 5, targets=(0, 0, 1, 2, 2), labels=("a", "b", "c"))
    hits = np.array([True, False, True, False, False])
    assert unpaired.top1_by_name(hits, task, {"a", "elsewhere"}) == pytest.approx({"kept": 1 / 2, "lost": 1 / 3})

    runs = [
        {"way": way, "seed": seed, "top1": dict.fromkeys(TASKS, 0.3), "by_name": {"kept": kept, "lost": 0.2}}
        for way, seed, kept in ((unpaired.PAIRS, 0, 0.3), (unpaired.PAIRS, 1, 0.5), ("labels", 0, 0.4))
    ]
    table = unpaired.names_markdown({"teachers": {}, "runs": runs}).splitlines()
    assert table[2:] == [f"| {unpaired.PAIRS} | 30.0 | 20.0 |", "| labels | 40.0 | 20.0 |"]
