"""A session of all commands, as terminals and pipes show it."""

from __future__ import annotations

from pathlib import Path

import pytest

pyte = pytest.importorskip("pyte")
from benchmarks.pages import terminal  # noqa: E402
from benchmarks.pages.terminal import TERMINALS, Terminal, play  # noqa: E402


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
