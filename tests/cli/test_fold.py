"""Messages on a narrow terminal: broken at spaces, and commands in them can be copied."""

from __future__ import annotations

import io
import shlex

import pytest
from support import Terminal

from clip_rd_edge.cli.output import cut, echo, fold, fold_command, fold_items


def test_a_line_is_broken_at_spaces_and_what_follows_is_indented() -> None:
    text = "error: The output runs/first already exists and is not empty."
    folded = fold(text, 30)
    assert folded == "error: The output runs/first\n  already exists and is not\n  empty."
    assert fold(text, 0) == fold(text, len(text)) == text


def test_what_has_no_space_stays_whole() -> None:
    path = "a" * 50
    assert fold(f"error: {path} does not exist.", 30) == f"error:\n  {path}\n  does not exist."


def test_an_indented_line_stays_indented() -> None:
    assert fold("    image tower, static: faster", 20) == "    image tower,\n      static: faster"


def test_wide_characters_take_two_columns() -> None:
    assert fold("猫猫猫 猫猫猫", 12) == "猫猫猫\n  猫猫猫"
    assert fold("猫猫猫 猫猫猫", 13) == "猫猫猫 猫猫猫"


@pytest.mark.parametrize("width", range(12, 60))
def test_a_command_in_a_hint_is_the_same_for_a_shell(width: int) -> None:
    command = "clip-rd-edge classify bundle a.jpg --labels \"a red cat\" 'a dog' --top 3 --threads 1"
    folded = fold(f"hint: for example: {command}, or ask for help with all of it", width)
    start = folded.index("clip-rd-edge")
    copied = folded[start : folded.index(", or") if ", or" in folded else folded.index(",\n")]
    assert shlex.split(copied.replace("\\\n", "")) == shlex.split(command)
    assert all(line.endswith("\\") for line in copied.split("\n")[:-1])
    assert "\\" not in folded[: start - 1] + folded[start + len(copied) :]


@pytest.mark.parametrize("installer", ["pip", "uv pip", "uv tool", "pipx"])
def test_an_install_command_in_a_hint_is_broken_as_a_command(installer: str) -> None:
    folded = fold(f"hint: {installer} install 'clip-rd-edge[demo] @ file:///wheels/a.whl'", 40)
    assert folded == f"hint: {installer} install \\\n  'clip-rd-edge[demo] @ file:///wheels/a.whl'"


@pytest.mark.parametrize("width", range(30, 90, 7))
def test_each_of_two_commands_is_the_same_for_a_shell(width: int) -> None:
    commands = ["clip-rd-edge verify bundle", 'clip-rd-edge classify bundle photo.jpg --labels "a cat" "a dog"']
    folded = fold(f"next: {'; '.join(commands)}", width)
    copied = folded.removeprefix("next:").replace("\\\n", "").split(";")
    assert [shlex.split(command) for command in copied] == [shlex.split(command) for command in commands]
    assert "\n" not in copied[1].strip()


def test_only_a_terminal_gets_folded_messages_and_only_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    text = "word " * 20
    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    echo(text, err=True)
    assert max(map(len, terminal.getvalue().splitlines())) <= 20
    monkeypatch.setattr("sys.stderr", pipe)
    echo(text, err=True)
    assert pipe.getvalue() == f"{text}\n"
    data = Terminal()
    echo(text, file=data)
    assert data.getvalue() == f"{text}\n"


@pytest.mark.parametrize("width", range(20, 70, 7))
def test_a_command_with_a_comment_is_the_same_for_a_shell(width: int) -> None:
    command = "clip-rd-edge export RUN --target jetson-orin -o 'my bundle'"
    folded = fold_command(f"{command}      # FP16; --precision int8 works, too", width)
    assert max(map(len, folded.splitlines())) <= width
    comments = [line for line in folded.splitlines() if line.startswith("#")]
    assert " ".join(line.removeprefix("# ") for line in comments) == "FP16; --precision int8 works, too"
    assert shlex.split(folded.replace("\\\n", ""), comments=True) == shlex.split(command)
    assert fold_command(command, 200) == command


def test_items_are_broken_between_them() -> None:
    items = ["a long label 54.4%", "green 43.4%", "red 2.2%"]
    assert fold_items("red.png", items, 0) == "red.png\ta long label 54.4%  green 43.4%  red 2.2%"
    assert fold_items("red.png", items, 40) == "red.png\ta long label 54.4%  green 43.4%\n\tred 2.2%"
    assert fold_items("red.png", items, 10) == "red.png\ta long label 54.4%\n\tgreen 43.4%\n\tred 2.2%"


def test_a_line_is_cut_by_its_columns() -> None:
    assert cut("frame 1 猫", 9) == "frame 1 "
    assert cut("frame 1", 0) == "frame 1"


def test_prose_on_stdout_is_folded_and_tables_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    terminal, table = Terminal(), f"| {'a | ' * 20}"
    monkeypatch.setattr("sys.stdout", terminal)
    echo(f"{'word ' * 10}\n{table}", prose=True)
    *prose, row = terminal.getvalue().splitlines()
    assert max(map(len, prose)) <= 20
    assert row == table
