"""examples/rank_teachers.py puts the teacher first from which the student learns most."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

import clip_rd_edge as edge
from clip_rd_edge.settings.measuring import Evaluate
from clip_rd_edge.settings.training import Distill

SCRIPT = Path(__file__).parents[2] / "examples" / "rank_teachers.py"


def test_teachers_are_ranked_by_their_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned, runs = {"small": 0.5, "large": 0.3}, list[Distill]()

    def evaluate(*arguments: str) -> list[SimpleNamespace]:
        model = Evaluate(*arguments).model
        return [SimpleNamespace(top1=learned.get(model, 0.9))]

    def distill(**options: object) -> str:
        runs.append(Distill(**options))  # type: ignore[arg-type]
        return f"a student of {runs[-1].teacher}"

    monkeypatch.setattr(edge, "distill", distill)
    monkeypatch.setattr(edge, "evaluate", lambda model, task: evaluate(model.removeprefix("a student of "), task))
    rank = runpy.run_path(str(SCRIPT))["rank"]
    ranked = rank("resnet18", "pairs.csv", "images", ["large", "small"], tmp_path, steps=2)
    assert [name for _, _, name in ranked] == ["small", "large"]
    assert {(run.student, run.steps, run.resume) for run in runs} == {("resnet18", 2, True)}
    assert len({run.output for run in runs}) == 2
