from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from clip_rd_edge.benchmarking.report import _pareto_front, draw
from clip_rd_edge.benchmarking.results import Results


def test_the_same_results_give_an_identical_file(results: Results) -> None:
    assert draw(results, file_format="svg") == draw(results, file_format="svg")


def test_results_without_a_zero_shot_task_have_no_plot(results: Results) -> None:
    rows = tuple(replace(row, scores=()) for row in results.rows[:1])
    assert draw(replace(results, rows=rows), file_format="png") is None


def test_pareto_front_excludes_dominated_models() -> None:
    x, y = np.asarray([10.0, 2.0, 5.0, 5.0, 1.0]), np.asarray([80.0, 60.0, 50.0, 70.0, 10.0])
    assert _pareto_front(x, y) == [4, 1, 3, 0]
