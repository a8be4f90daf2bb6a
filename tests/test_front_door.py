"""The Python API: the names in `clip_rd_edge`, cheap imports, and agreement with the command line."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import commands

import clip_rd_edge as edge
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.runtime.classifier import Deciding

ROOT = Path(__file__).parents[1]
# Options that exist only on the command line.
PRINTING = {"as_json", "as_csv", "null", "confusion", "all_extras"}
FUNCTIONS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "benchmark": (edge.benchmark, {"compared", "init", "allow_busy"}),  # --compare is edge.compare
    "demo": (edge.demo, {"open_page"}),
    "index": (edge.index, {"watch"}),  # --watch is edge.watch_index
    "serve": (edge.serve, {"token_file"}),  # a file, or a variable: a token in a command line is seen by others
    "evidence run": (edge.evidence_run, set()),
    "evidence report": (edge.evidence_report, set()),
}


COMMANDS = {" ".join(words): command for words, command in commands()}


def parameters_of(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters
    names = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    if function is edge.serve:
        names -= {"token"}
    return names


def test_the_errors_that_docstrings_name_can_be_caught() -> None:
    functions = [getattr(edge, name) for name in edge.__all__]
    named = {error for function in functions for error in re.findall(r"\b[A-Z]\w+Error\b", function.__doc__ or "")}
    assert "UsageError" in named
    assert named <= set(edge.__all__)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"classify"}))
def test_a_command_and_its_function_have_the_same_options(name: str) -> None:
    function, extra = FUNCTIONS.get(name) or (getattr(edge, name.replace("-", "_")), set())
    options = {str(parameter.name) for parameter in COMMANDS[name].params} - PRINTING - extra
    assert options == parameters_of(function) - {"reporter", "ready"}


def test_the_classify_command_has_the_options_of_load_and_classify() -> None:
    options = {str(parameter.name) for parameter in COMMANDS["classify"].params} - PRINTING
    assert options == {"bundle"} | parameters_of(edge.Model.classify) - {"self"} | set(Deciding.__annotations__) | {
        "camera",
        "threads",
        "device",
        "force",
    }


def test_every_public_name_can_be_imported() -> None:
    for name in edge.__all__:
        assert getattr(edge, name) is getattr(edge, name)
    # Importing a subpackage would replace a function of the same name.
    folders = {path.parent.name for path in (ROOT / "clip_rd_edge").glob("*/__init__.py")}
    assert not folders & set(edge.__all__)
    assert set(edge.__all__) <= set(dir(edge))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        edge.lode  # noqa: B018


def internal_imports(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
    return [name for name in names if name.startswith("clip_rd_edge.")]


def test_readme_and_examples_import_no_internal_modules() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    sources = [*blocks, *(path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py"))]
    internal = {name for source in sources for name in internal_imports(source)}
    # What a loss term and a format of one's own are made with.
    names = (
        "losses.terms", "bundle.formats", "exporting.formats", "exporting.towers", "runtime.encoder",
        "runtime.backends.one_input",
    )  # fmt: skip
    assert internal <= {f"clip_rd_edge.{name}" for name in names}
    assert internal_imports("from clip_rd_edge.runtime import load") == ["clip_rd_edge.runtime"]


def test_single_inputs_give_single_results_and_lists_give_lists(colour_bundle: Path, colour_images: Path) -> None:
    model = edge.load(colour_bundle)
    width = model.describe().embedding_size
    paths = [colour_images / name for name in ("red.png", "green.png", "blue.jpg")]
    assert model.encode_images(paths[0]).shape == model.encode_texts("red").shape == (width,)
    assert model.encode_images(paths).shape == model.encode_texts(["red", "green", "blue"]).shape == (3, width)
    assert model.encode_images([]).shape == (0, width)
    batch = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    np.testing.assert_allclose(model.encode_images(batch), model.encode_images(paths), atol=1e-6)
    answers = model.classify(paths, labels=["red", "green", "blue"])
    assert [answer[0].label for answer in answers] == ["red", "green", "blue"]
    assert model.classify(paths[0], labels="red")[0] == ("red", 1.0)  # one label, not three letters


def test_a_bundle_is_evaluated_by_its_path_or_opened(colour_bundle: Path, colour_images: Path, tmp_path: Path) -> None:
    task = tmp_path / "task"
    for colour in ("red", "green"):
        (task / colour).mkdir(parents=True)
        (task / colour / "image.png").write_bytes((colour_images / f"{colour}.png").read_bytes())
    (score,) = edge.evaluate(colour_bundle, str(task))
    assert score.top1 == 1.0  # type: ignore[union-attr]
    assert edge.evaluate(edge.load(colour_bundle), [str(task)] * 2) == [score]
    with pytest.raises(edge.UsageError, match="already loaded"):
        edge.evaluate(edge.load(colour_bundle), str(task), threads=1)


def test_a_model_is_exported_and_loaded(student: ClipModel, tmp_path: Path) -> None:
    save_clip(tmp_path / "model", student, provenance={})  # whose export the tests have at hand
    bundle = edge.export(tmp_path / "model", tmp_path / "bundle", labels=["a cat", "a dog"])
    assert (bundle.manifest.precision, bundle.trials) == ("fp32", ())
    model, original = edge.load(bundle), edge.load(tmp_path / "model")
    np.testing.assert_allclose(model.encode_texts("a cat"), original.encode_texts("a cat"), atol=1e-4)
    assert "onnxruntime" in repr(model)
    assert "torch" in repr(original)
    assert {answer.label for answer in model.classify(np.zeros((9, 9, 3), np.uint8))} == {"a cat", "a dog"}
    with pytest.raises(edge.UsageError, match="is already a bundle"):
        edge.export(bundle, tmp_path / "again")


WRONG_CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: edge.distill(data="emoji", student="resnet18", output=None), "output"),  # type: ignore[arg-type]
    (lambda: edge.distill(data="p", student="s", output="o", batchsize=8), "'batchsize'.*'batch_size'"),  # type: ignore[call-arg]
    (lambda: edge.distill(data="p", student="s", output="o", batch_size="8"), "batch_size"),  # type: ignore[arg-type]
    (lambda: edge.serve("o", allow_hosts=["camera"]), "'allow_hosts'.*'allow_host'"),  # type: ignore[call-arg]
]


@pytest.mark.parametrize(("call", "message"), WRONG_CALLS)
def test_a_call_with_a_wrong_argument_is_refused_in_one_sentence(call: Callable[[], object], message: str) -> None:
    with pytest.raises(edge.UsageError, match=message):
        call()


def test_onnx_runtime_sends_nothing_to_its_makers(colour_bundle: Path, colour_images: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    image = str(colour_images / "red.png")
    code = f"import clip_rd_edge as edge; edge.load({str(colour_bundle)!r}).encode_images({image!r})"
    # It keeps quiet where it takes the machine for one of continuous integration: hide all that tells it so.
    environment = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    # Where it sends, it keeps the number of the machine and what is to be sent.
    assert [path.name for path in (home / ".cache").iterdir()] == ["clip-rd-edge"]
