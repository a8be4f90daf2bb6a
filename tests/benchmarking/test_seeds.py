"""The table of several results of one benchmark."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from clip_rd_edge.benchmarking.results import Results
from clip_rd_edge.errors import InputError
from clip_rd_edge.evidence.suite import seeds_table


def with_top1(results: Results, values: dict[str, float]) -> Results:
    """Return the results with another top-1 on their task, by the row's role."""
    rows = (replace(row, scores=(replace(row.scores[0], top1=values[row.role]),)) for row in results.rows)
    return replace(results, rows=tuple(rows))


def test_seeds_table_has_means_spreads_and_paired_ratios(results: Results) -> None:
    roles = {row.role: row.label for row in results.rows}
    first = dict.fromkeys(roles, 0.5) | {"teacher": 0.4, "student": 0.2}
    second = dict.fromkeys(roles, 0.5) | {"teacher": 0.5, "student": 0.4}
    lines = seeds_table([with_top1(results, first), with_top1(results, second)]).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1].strip(" |") for line in lines[2:]}
    assert cells[roles["teacher"]] == "45.0 ± 7.1 (40.0 to 50.0)"
    assert cells[roles["student"]] == "30.0 ± 14.1 (20.0 to 40.0)"
    # (0.2 / 0.4 + 0.4 / 0.5) / 2, and not 0.3 / 0.45
    assert cells[f"{roles['student']} / {roles['teacher']}"] == "0.65× ± 0.21 (0.50 to 0.80)"


def test_seeds_table_leaves_out_a_task_whose_images_differ_and_says_so(results: Results) -> None:
    second = replace(results.rows[0].scores[0], task="second")

    def measured(second_images: str, task_images: str = "") -> Results:
        rows = []
        for row in results.rows:
            (own,) = row.correctness
            own = replace(own, images=task_images or own.images)
            other = replace(own, task="second", images=second_images)
            rows.append(replace(row, scores=(*row.scores, second), correctness=(own, other)))
        return replace(results, rows=tuple(rows))

    unknown, old, new = measured(""), measured("old"), measured("new")
    lines = seeds_table([unknown, old, new]).splitlines()
    assert lines[0] == "| model | task |"
    assert lines[-1] == "Accuracy on second is left out: the results have other images, labels or captions of it."
    assert seeds_table([unknown, old]).splitlines()[0] == "| model | task | second |"
    with pytest.raises(InputError):
        seeds_table([old, measured("new", "new")])
