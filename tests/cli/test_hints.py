"""Errors name options as the front end that shows them does, wherever in the package they come from."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import commands

import clip_rd_edge
from clip_rd_edge.cli.main import spelling
from clip_rd_edge.errors import InterruptedRunError, UsageError

Run = Callable[..., tuple[int, str, str]]
PACKAGE = Path(clip_rd_edge.__file__).parent


def texts_of_errors() -> Iterator[tuple[str, str]]:
    """The messages and hints in the package's code, with the file; a ? stands for what is formatted into them."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_error = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error")
            parts = [*node.args[:1], *(word.value for word in node.keywords if word.arg == "hint")] if is_error else []
            for value in (inner for part in parts for inner in ast.walk(part)):
                if isinstance(value, ast.JoinedStr):
                    yield "".join(str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "?"
                                  for part in value.values), file.name  # fmt: skip
                elif isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value, file.name


def test_every_option_that_an_error_names_is_one_of_a_command() -> None:
    options = {parameter.name for _, command in commands() for parameter in command.params}
    options |= {getattr(parameter, "also", "") for _, command in commands() for parameter in command.params}
    named = {(name, file) for text, file in texts_of_errors() for name in re.findall(r"\{([a-z]+(?:_[a-z]+)*)\}", text)}
    assert len(named) > 50
    assert {(name, file) for name, file in named if name not in options} == set()


@pytest.mark.parametrize(
    ("command", "hint", "expected"),
    [
        ("distill", "the same command and {resume}", "the same command and --resume"),
        ("quickstart", "the same command and {resume}", ""),
        ("export", "fix them, or accept them: {max_bad} 0.1", "fix them"),
        ("distill", "add {pretrained} with a tag", "add --teacher-pretrained with a tag"),
        ("evaluate", "name {tasks} a/, or {templates} x", "name --task a/, or --template x"),
        ("embed", "choose another {store}", "choose another --output"),
        ("verify", "export it with --labels", "export it with --labels"),
        ("evidence run", "use {teacher}, or {resume}", "use --teacher"),
        ("nonsense", "use {batch_size}", "use --batch-size"),
    ],
)
def test_a_hint_names_the_options_of_the_command_and_leaves_out_the_ways_that_it_lacks(
    command: str, hint: str, expected: str
) -> None:
    error = UsageError("No.", hint=hint)
    assert error.hint_for(spelling([*command.split(), "--some-value", "value"])) == expected


def test_python_and_the_command_line_name_one_option_each_their_own_way() -> None:
    error = UsageError("{batch_size} is 4, but data/{000..012}.tar has 3.", hint="{batch_size} 3, or {x}")
    assert str(error) == "batch_size is 4, but data/{000..012}.tar has 3."
    assert error.hint == "batch_size 3, or x"
    spell = spelling(["distill"])
    assert error.message_for(spell) == "--batch-size is 4, but data/{000..012}.tar has 3."
    assert error.hint_for(spell) == "--batch-size 3"


def interrupting(module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise InterruptedRunError("Stopped by SIGTERM.", hint="resume with the same command and {resume}")

    monkeypatch.setattr(module, name, interrupt)


@pytest.mark.parametrize("where", ["tune_teacher", "_train_student"])
def test_an_interrupted_quickstart_says_that_the_same_command_resumes(
    command_line: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    pipeline = importlib.import_module("clip_rd_edge.pipeline")
    for stage in ("_render_pairs", "tune_teacher", "trim_text"):
        monkeypatch.setattr(pipeline, stage, lambda *_: None)
    interrupting(pipeline, where, monkeypatch)
    code, _, error = command_line("quickstart", "-o", tmp_path)
    assert code == 75
    assert "hint: run the same command again to resume" in error


def test_interrupted_evidence_says_that_the_same_command_resumes(
    command_line: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupting(importlib.import_module("clip_rd_edge.evidence.run"), "_embedded_teacher", monkeypatch)
    code, _, error = command_line("evidence", "run", "method-evidence", "-o", tmp_path)
    assert code == 75
    assert "hint: run the same command again to resume" in error


def test_a_teacher_without_weights_is_told_the_option_of_distill(
    command_line: Run, pairs_csv: Path, tmp_path: Path
) -> None:
    arguments = ("--data", pairs_csv, "--student", "test_resnet", "--batch-size", "6", "-o", tmp_path / "run")
    code, _, error = command_line("distill", *arguments, "--teacher", "ViT-B-32")
    assert code == 2
    assert "hint: add --teacher-pretrained with a checkpoint file or a tag: openai" in error
