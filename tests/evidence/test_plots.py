from __future__ import annotations

import msgspec
import pytest

from clip_rd_edge.evidence import report as plots
from clip_rd_edge.evidence.results import Curve

from .conftest import Make


def test_the_name_of_a_task_is_no_formula(make: Make) -> None:
    evidence = make({("none", 0): 4})
    curves = {f"evaluation/{task}": Curve(steps=(1, 2), values=(0.1, 0.2)) for task in ("100$%$", "emoji")}
    evidence = msgspec.structs.replace(
        evidence, runs=tuple(msgspec.structs.replace(run, curves=curves) for run in evidence.runs)
    )
    assert plots.learning_curves(evidence, measure="top-1").startswith(b"\x89PNG")


def test_seeds_are_averaged_where_all_have_a_point(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = make({("none", 0): 4, ("none", 1): 3})
    whole, gaps = evidence.runs
    name = "evaluation/emoji, unseen style"
    curves = {
        **{key: Curve(steps=(1, 2, 3), values=(0.1, 0.2, 0.3)) for key in (name, "student_positive")},
        "student_negative": Curve(steps=(2, 3), values=(0.1, 0.1)),  # the first was not finite
    }
    evidence = msgspec.structs.replace(evidence, runs=(msgspec.structs.replace(whole, curves=curves), gaps))
    drawn = []
    monkeypatch.setattr(plots, "_png", lambda figure, grid: drawn.append(grid) or b"")
    plots.learning_curves(evidence, measure="top-1")
    plots.geometry_curves(evidence)
    (accuracy,) = drawn[0][0][0].lines
    assert accuracy.get_xydata().tolist() == [[1, pytest.approx(10)], [2, pytest.approx(20)]]
    gap, *_ = drawn[1][2][0].lines
    assert gap.get_xydata().tolist() == [[2, pytest.approx(0.05)]]
