"""Each data set is indexed twice, and figures of the same day and size stay beside new ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.data import scale


def measure(monkeypatch: pytest.MonkeyPatch, output: Path, *options: str) -> dict[str, dict[str, scale.Figures]]:
    monkeypatch.setattr(sys, "argv", ["scale.py", "-o", str(output), "--shards", "3", *options])
    scale.main()
    data_sets: dict[str, dict[str, scale.Figures]] = json.loads(output.read_text())["data sets"]
    return data_sets


def test_shards_are_indexed_at_the_first_start_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = measure(monkeypatch, tmp_path / "scale.json", "--samples", "500", "--of", "shards")["shards"]
    assert list(shards) == list(scale.STARTS)
    assert [figures["samples"] for figures in shards.values()] == [1500, 1500]
    first, later = (figures["opening_cpu_seconds"] for figures in shards.values())
    assert 0 < later < first


def test_other_data_sets_of_the_same_size_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"opening_cpu_seconds": 1.0, "first_batch_seconds": 2.0, "memory_mb": 3.0}
    monkeypatch.setattr(scale, "starts", lambda kind, shards, samples: {"first start": figures})
    output = tmp_path / "scale.json"
    assert list(measure(monkeypatch, output, "--samples", "5", "--of", "store", "shards")) == ["shards", "store"]
    assert list(measure(monkeypatch, output, "--samples", "5", "--of", "csv")) == ["shards", "csv", "store"]
    assert list(measure(monkeypatch, output, "--samples", "6", "--of", "csv")) == ["csv"]
