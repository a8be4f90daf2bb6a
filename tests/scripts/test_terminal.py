"""The recorder of terminals: what it reports, and the commands that need no model, in a real terminal and in pipes."""

from __future__ import annotations

from pathlib import Path

import pytest

pyte = pytest.importorskip("pyte")
from benchmarks.pages import terminal  # noqa: E402
from benchmarks.pages.terminal import TERMINALS, Step, Terminal, play, record, write_program  # noqa: E402

NARROW = Terminal("narrow", 20, 5)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    return write_program(tmp_path / "bin")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("echo aaaaaaaaaaaa bbbbbbbbbbbb", "a line breaks within 'bbbbbbbbbbbb'"),
        ("echo aaaaaaaaaaaa bbbbbbb cccc", None),
        ("echo /a/path/that/is/longer/than/the/line", None),
        ("printf '\\033[?25l'", "the cursor stays hidden"),
        ("printf 'no newline'", "the prompt would not begin a line"),
        ("echo 'training ━━━━━━'", "left behind: training ━━━━━━"),
        ("printf 'training ━━━━\\r\\033[2K'", None),
        ("exit 3", "exit code 3; expected 0"),
        ("echo 'Traceback (most recent call last)'; cat", "a traceback is shown"),
    ],
)
def test_what_looks_wrong_is_reported(line: str, problem: str | None, programs: Path, tmp_path: Path) -> None:
    step = Step(line.replace("; cat", ""))
    wide = Terminal("wide", 60, 5) if "Traceback" in line else NARROW
    assert record(step, wide, tmp_path, programs).problems == ([problem] if problem else [])


def test_colours_and_escapes_are_reported_where_there_should_be_none(programs: Path, tmp_path: Path) -> None:
    red = Step("printf '\\033[31mred\\033[0m\\n'")
    assert record(red, Terminal("colour", 20, 5), tmp_path, programs).problems == []
    plain = record(red, Terminal("plain", 20, 5, colour=False), tmp_path, programs)
    assert plain.problems == ["there are colours in spite of NO_COLOR"]
    assert record(red, Terminal("piped"), tmp_path, programs).problems == ["a pipe gets escape sequences"]


def test_ctrl_c_is_pressed_when_the_text_is_seen(programs: Path, tmp_path: Path) -> None:
    step = Step("echo ready; sleep 60", interrupt="ready", codes=(130,))
    recording = record(step, NARROW, tmp_path, programs)
    assert (recording.code, recording.text) == (130, "ready\n^C\n") or recording.code == -2
    assert record(Step("sh -c 'echo ready; sleep 60'", "ready", (130, -2)), TERMINALS[-1], tmp_path, programs).code != 0


@pytest.mark.parametrize("shown", [each for each in TERMINALS if each.colour], ids=lambda each: each.name)
def test_help_and_mistakes_look_right(shown: Terminal, tmp_path: Path) -> None:
    lines = ["clip-rd-edge --help", "clip-rd-edge classify --help", "clip-rd-edge recipe show clip-rd"]
    mistakes = [
        "clip-rd-edge classify bundle photos/rde.png",
        "clip-rd-edge distill --data pairs.csv",
    ]
    steps = [*map(Step, lines), *(Step(line, codes=(2,)) for line in mistakes)]
    assert [each.problems for each in play(steps, shown, tmp_path / "recordings")] == [[]] * len(steps)
    assert len(list((tmp_path / "recordings").iterdir())) == len(steps)


def test_the_session_has_every_command() -> None:
    lines = [step.line for step in terminal.session()]
    for name in terminal.COMMANDS:
        assert any(line.startswith(f"clip-rd-edge {name} ") and "--help" not in line for line in lines) or name in (
            "doctor", "devices"
        ), name  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("shown", TERMINALS, ids=lambda each: each.name)
def test_the_whole_session_looks_right(shown: Terminal, tmp_path: Path) -> None:
    recordings = play(terminal.session(), shown, tmp_path / "recordings")
    assert {each.step.line: each.problems for each in recordings if each.problems} == {}
