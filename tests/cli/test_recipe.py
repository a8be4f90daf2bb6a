from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clip_rd_edge.benchmarking.suite import EXAMPLE, read_suite
from clip_rd_edge.distillation.config import load_recipe, recipe_names

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("name", recipe_names())
def test_a_printed_recipe_is_the_recipe_with_a_comment_on_every_key(
    command_line: Run, tmp_path: Path, name: str
) -> None:
    code, output, error = command_line("recipe", "show", name)
    assert (code, error) == (0, "")
    (tmp_path / "mine.yaml").write_text(output)
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe(name)
    lines = output.splitlines()
    keys = [i for i, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")]
    uncommented = [lines[i].split(":")[0] for i in keys if not lines[i - 1].lstrip().startswith("#")]
    assert uncommented == ["epsilon"]  # explained together with betas
    assert max(map(len, lines)) <= 80  # as many as a terminal has at least


def test_recipes_are_listed_with_their_descriptions(command_line: Run) -> None:
    code, output, _ = command_line("recipe", "show")
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()] == recipe_names()
    assert "clip           Plain CLIP" in output
    assert max(map(len, output.splitlines())) <= 80


def test_an_unknown_recipe_leads_to_one_to_start_from(command_line: Run) -> None:
    code, _, error = command_line("recipe", "show", "clip-rdx")
    assert code == 2
    assert "Did you mean 'clip-rd'" in error
    assert "clip-rd-edge recipe show clip-rd > mine.yaml" in error


def test_a_printed_suite_can_be_read(command_line: Run, tmp_path: Path) -> None:
    code, output, error = command_line("benchmark", "--init")
    assert (code, error) == (0, "")
    (tmp_path / "suite.yaml").write_text(output)
    suite = read_suite(tmp_path / "suite.yaml")
    assert (suite.rows, suite.tasks) == (EXAMPLE.rows, EXAMPLE.tasks)
