from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.mathtext import MathTextParser

from clip_rd_edge.bundle.runs import EVALUATION_PREFIX, METRICS_FILE
from clip_rd_edge.distillation.metrics import plot_run

pytestmark = pytest.mark.usefixtures("plots")


@pytest.mark.parametrize("task", ["100$%$", "from $5 to $9", r"\$5"])
def test_the_name_of_a_task_is_no_formula(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formulas: list[str] = []
    parse = MathTextParser.parse

    def recorded(self: Any, text: str, *args: Any, **options: Any) -> Any:
        formulas.append(text)
        return parse(self, text, *args, **options)

    monkeypatch.setattr(MathTextParser, "parse", recorded)
    (tmp_path / METRICS_FILE).write_text(json.dumps({"step": 1, EVALUATION_PREFIX + task: 0.5}) + "\n")
    plot_run(tmp_path, tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"evaluation.png"}
    assert formulas == []
