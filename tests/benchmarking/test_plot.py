from __future__ import annotations

import re

import numpy as np
from msgspec.structs import replace

from clip_rd_edge.benchmarking.plot import _pareto_front, draw
from clip_rd_edge.benchmarking.results import Results


def test_the_same_results_give_an_identical_file(results: Results) -> None:
    assert draw(results, file_format="svg") == draw(results, file_format="svg")


def test_results_without_a_zero_shot_task_have_no_plot(results: Results) -> None:
    rows = tuple(replace(row, scores=()) for row in results.rows[:1])
    assert draw(replace(results, rows=rows), file_format="png") is None


def test_pareto_front_excludes_dominated_models() -> None:
    x, y = np.asarray([10.0, 2.0, 5.0, 5.0, 1.0]), np.asarray([80.0, 60.0, 50.0, 70.0, 10.0])
    assert _pareto_front(x, y) == [4, 1, 3, 0]


def test_the_models_are_numbered_and_named_in_a_key(results: Results) -> None:
    rows = tuple(replace(row, label=f"ResNet-10-T, {'with a bank of labels, ' * 3}{row.label}") for row in results.rows)
    svg = draw(replace(results, rows=rows), file_format="svg")
    assert svg is not None
    shown = re.findall("<!-- (.*?) -->", svg.decode())  # which matplotlib writes beside the outlines of a text
    numbers = [str(number) for number in range(1, len(rows) + 1)]
    assert [text for text in shown if text in numbers] == numbers
    (last,) = [text for text in shown if text.startswith(f"{len(rows)}  ")]
    assert last.startswith(f"{len(rows)}  ResNet-10-T, with a bank of labels")
    assert any(text.endswith("INT8, 3.0 MB") for text in shown)  # the key's lines are as wide as the plot, at most
