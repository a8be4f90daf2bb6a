from __future__ import annotations

import pytest

from clip_rd_edge.benchmarking.suite import parse_models
from clip_rd_edge.errors import ConfigError


def test_models_from_the_command_line() -> None:
    rows = parse_models(["teacher=hf-hub:o/m", "student=runs/a", "student=runs/b/"])
    assert [(row.label, row.model, row.role) for row in rows] == [
        ("Teacher", "hf-hub:o/m", "teacher"),
        ("Student a", "runs/a", "student"),
        ("Student b", "runs/b/", "student"),
    ]


@pytest.mark.parametrize("model", ["runs/a", "pupil=runs/a", "student="])
def test_a_model_without_a_role_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="is not ROLE=MODEL with one of the roles teacher, baseline, student"):
        parse_models([model])


def test_models_whose_folders_have_the_same_name_are_told_apart_by_their_paths() -> None:
    rows = parse_models(["student=runs/a/best", "student=runs/b/best", "student=runs/c", "exported=best"])
    assert [row.label for row in rows] == ["Student runs/a/best", "Student runs/b/best", "Student c", "Exported"]
