from __future__ import annotations

import numpy as np
import pytest

from benchmarks.devices.architectures import (
    BASELINE,
    EAGER,
    ORT_INT8,
    ArchitectureLatency,
    Architectures,
    architectures_table,
    summarise_runtimes,
)
from clip_rd_edge.benchmarking.results import this_environment


def test_ratios_are_paired_by_repeat_and_the_best_runtime_is_shown() -> None:
    # The machine runs at half speed after the first repeat, which does not change the ratios.
    repeats = [
        {EAGER: np.full(3, 10.0 * factor), ORT_INT8: np.full(3, 2.0 * factor), BASELINE: np.full(3, 100.0 * factor)}
        for factor in (1, 2, 2)
    ]
    timed, baseline = summarise_runtimes(repeats, {ORT_INT8: "static"})
    assert baseline == 200
    assert [result.ratio for result in timed] == [(10, 10, 10), (50, 50, 50)]
    row = ArchitectureLatency(name="tiny", parameters=1_500_000, timed=timed, skipped={"torch.compile": "no compiler"})
    assert (row.best.runtime, row.best.method) == (ORT_INT8, "static")
    results = Architectures(
        environment=this_environment(), baseline="ViT-B/16", image_size=224, threads=2, weights="random", rows=(row,)
    )
    (line,) = architectures_table(results).splitlines()[2:]
    assert line == "| tiny | 1.5 | 20.00 | – | – | 4.00 | – | – | – | ORT INT8, 50.0× (50.0 to 50.0) |"
    assert row.best.latency_ms == pytest.approx(4)
