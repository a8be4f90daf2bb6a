"""The recorder of terminals: what it reports, and the commands that need no model, in a real terminal and in pipes."""

from __future__ import annotations

from pathlib import Path

import pytest

pyte = pytest.importorskip("pyte")
from benchmarks.pages import terminal  # noqa: E402
from benchmarks.pages.terminal import TERMINALS, Step, Terminal, play  # noqa: E402


@pytest.mark.parametrize("shown", [each for each in TERMINALS if each.colour], ids=lambda each: each.name)
def test_help_and_mistakes_look_right(shown: Terminal, tmp_path: Path) -> None:
    lines = ["clip-rd-edge --help", "clip-rd-edge classify --help", "clip-rd-edge recipe clip-rd"]
    mistakes = ["clip-rd-edge classify bundle photos/rde.png", "clip-rd-edge distill --data pairs.csv"]
    steps = [*map(Step, lines), *(Step(line, codes=(2,)) for line in mistakes)]
    assert [each.problems for each in play(steps, shown, tmp_path / "recordings")] == [[]] * len(steps)
    assert len(list((tmp_path / "recordings").iterdir())) == len(steps)


def test_the_session_has_every_command() -> None:
    lines = [step.line for step in terminal.session()]
    for name in terminal.COMMANDS:
        assert any(line.startswith(f"clip-rd-edge {name} ") and "--help" not in line for line in lines) or name in (
            "doctor", "targets"
        ), name  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("shown", TERMINALS, ids=lambda each: each.name)
def test_the_whole_session_looks_right(shown: Terminal, tmp_path: Path) -> None:
    recordings = play(terminal.session(), shown, tmp_path / "recordings")
    assert {each.step.line: each.problems for each in recordings if each.problems} == {}
