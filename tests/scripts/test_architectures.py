from __future__ import annotations

import numpy as np
import pytest
from architectures import (
    BASELINE,
    EAGER,
    ORT_INT8,
    ArchitectureLatency,
    Architectures,
    architectures_table,
    summarise_runtimes,
)

from clip_rd_edge.benchmarking.results import this_environment


def test_ratios_are_taken_within_a_sitting_and_the_best_runtime_is_shown() -> None:
    # A machine that is half as fast in the second sitting: ratios stay.
    sittings = [
        {EAGER: np.full(3, 10.0 * slow), ORT_INT8: np.full(3, 2.0 * slow), BASELINE: np.full(3, 100.0 * slow)}
        for slow in (1, 2, 2)
    ]
    timed, baseline = summarise_runtimes(sittings, {ORT_INT8: "static"})
    assert baseline == 200
    assert [each.ratio for each in timed] == [(10, 10, 10), (50, 50, 50)]
    row = ArchitectureLatency(name="tiny", parameters=1_500_000, timed=timed, skipped={"torch.compile": "no compiler"})
    assert (row.best.runtime, row.best.made) == (ORT_INT8, "static")
    results = Architectures(
        environment=this_environment(), baseline="ViT-B/16", image_size=224, threads=2, weights="random", rows=(row,)
    )
    (line,) = architectures_table(results).splitlines()[2:]
    assert line == "| tiny | 1.5 | 20.00 | – | – | 4.00 | – | – | – | ORT INT8, 50.0× (50.0 to 50.0) |"
    assert row.best.latency_ms == pytest.approx(4)
