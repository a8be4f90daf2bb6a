"""A hint names only options that the command has, wherever in the package it comes from."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from support import commands

import clip_rd_edge
from clip_rd_edge.cli._hints import fitting_hint
from clip_rd_edge.cli.main import cli
from clip_rd_edge.errors import InterruptedRunError

Run = Callable[..., tuple[int, str, str]]
PACKAGE = Path(clip_rd_edge.__file__).parent
OTHER_COMMANDS = re.compile(r"^(export|run the export|train|pip) |clip-rd-edge ")


def hints() -> Iterator[str]:
    """The hints in the package's code that name options; an X stands for what is formatted into them."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.keyword) and node.arg == "hint"):
                continue
            for value in ast.walk(node.value):
                parts = value.values if isinstance(value, ast.JoinedStr) else [value]
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)
                if re.search(r"(^|\W)-\w|--\w", text):
                    yield text


def test_hints_are_found() -> None:
    assert "resume with the same command and --resume" in set(hints())
    assert len(set(hints())) > 30


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=str)
def test_no_hint_names_an_option_that_the_command_lacks(path: tuple[str, ...], command: click.Command) -> None:
    names = (name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))
    options = {*names, "--help", "--debug"}
    for hint in hints():
        for part in fitting_hint(hint, cli, path).split(", or "):
            named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", part))
            assert named <= options or OTHER_COMMANDS.search(part), part


@pytest.mark.parametrize(
    ("command", "hint", "expected"),
    [
        ("distill", "resume with the same command and --resume", "resume with the same command and --resume"),
        ("quickstart", "resume with the same command and --resume", ""),
        ("export", "fix them, or accept them: --max-bad 0.1", "fix them"),
        ("distill", "fix them, or accept them: --max-bad 0.1", "fix them, or accept them: --max-bad 0.1"),
        ("distill", "add --pretrained with a tag", "add --teacher-pretrained with a tag"),
        ("distill", "pass the file: --pretrained-image FILE", "pass the file: --pretrained-image FILE"),
        ("embed", "choose another --teacher-cache", "choose another -o"),
        ("evaluate", "add --pretrained with a tag", "add --pretrained with a tag"),
        ("index", "choose another -o, or replace it with --force", "choose another -o"),
        ("search", "export the bundle again with --labels", "export the bundle again with --labels"),
        ("evidence run", "use --teacher, or --resume", "use --teacher"),
        ("nonsense", "use --resume", "use --resume"),
    ],
)
def test_alternatives_that_do_not_apply_are_left_out(command: str, hint: str, expected: str) -> None:
    assert fitting_hint(hint, cli, [*command.split(), "--some-value", "value"]) == expected


def interrupting(module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise InterruptedRunError("Stopped by SIGTERM.", hint="resume with the same command and --resume")

    monkeypatch.setattr(module, name, interrupt)


@pytest.mark.parametrize("where", ["tune_teacher", "_train_student"])
def test_an_interrupted_quickstart_says_that_the_same_command_resumes(
    command_line: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    pipeline = importlib.import_module("clip_rd_edge.walkthrough.pipeline")
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
