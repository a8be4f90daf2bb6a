from __future__ import annotations

import numpy as np
import pytest

from benchmarks.devices.towers import TowerLatencies, Towers, VariantFile, summarise, towers_table
from clip_rd_edge.benchmarking.results import this_environment


def _row() -> TowerLatencies:
    files = {
        "ORT FP32": VariantFile(path="a", method="float32", size_bytes=400),
        "ORT INT8": VariantFile(path="b", method="dynamic", size_bytes=100),
        "OpenVINO FP32": VariantFile(path="a", method="float32", size_bytes=400),
        "OpenVINO BF16": VariantFile(path="a", method="float32", size_bytes=400),
    }
    # The machine runs at half speed after the first repeat, which does not change the ratios.
    times = {"ORT FP32": 8.0, "ORT INT8": 4.0, "OpenVINO FP32": 10.0, "OpenVINO BF16": 2.0}
    repeats = [{name: np.full(3, factor * time) for name, time in times.items()} for factor in (1, 2, 2)]
    repeats[2]["ORT INT8"] = np.full(3, 4.0)
    return summarise("resnet18", files, repeats)


def test_speedups_are_paired_by_repeat() -> None:
    row = _row()
    by_name = {variant.name: variant for variant in row.variants}
    assert by_name["ORT FP32"].speedup == (1, 1, 1)
    assert by_name["ORT INT8"].speedup == (2, 2, 4)
    assert by_name["OpenVINO FP32"].speedup == pytest.approx((0.8, 0.8, 0.8))
    assert row.best == (2, 1, 2)


def test_the_table_shows_every_variant() -> None:
    table = towers_table(Towers(environment=this_environment(), threads=1, weights="random", towers=(_row(),)))
    assert "| resnet18 | 16.00 | 2.00× (2.00 to 4.00) | 0.80× (0.80 to 0.80) | 4.00×" in table
    assert "| – | – | 2.00× (1.00 to 2.00) | dynamic, 0.25× |" in table  # without NNCF
