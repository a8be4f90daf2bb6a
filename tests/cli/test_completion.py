"""Completion in the shell, as the lines in docs/index.md set it up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from clip_rd_edge.cli.main import cli

GUIDE = Path(__file__).parents[2] / "docs" / "index.md"


def completions(line: str) -> list[tuple[str, str]]:
    """Return type and value of what a shell is offered for a line whose last word is incomplete."""
    _, *words, last = line.split(" ")
    offered = ShellComplete(cli, {}, "clip-rd-edge", "_CLIP_RD_EDGE_COMPLETE").get_completions(words, last)
    return [(item.type, item.value) for item in offered]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("clip-rd-edge quick", ("plain", "quickstart")),
        ("clip-rd-edge export run --precision i", ("plain", "int8")),
        ("clip-rd-edge distill --recipe mine", ("file", "mine")),
        ("clip-rd-edge export run --target sm86,jetson-o", ("plain", "sm86,jetson-orin")),
        ("clip-rd-edge evaluate run --task emo", ("plain", "emoji:unseen-style")),
    ],
)
def test_the_shell_is_offered_commands_options_values_presets_and_files(line: str, expected: tuple[str, str]) -> None:
    assert expected in completions(line)


def test_a_new_shell_completes_though_the_command_is_not_there_yet(tmp_path: Path) -> None:
    """It is in a virtual environment, which the shell's own file does not activate."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "clip-rd-edge"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m clip_rd_edge "$@"\n')
    script.chmod(0o755)
    guide = GUIDE.read_text(encoding="utf-8")
    lines = guide.partition("\n# bash\n")[2].partition("\n# zsh\n")[0]
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", lines], env=environment, check=True)
    outside = {"HOME": str(tmp_path), "PATH": ""}
    command = [str(shutil.which("bash")), "--norc", "-c", ". ~/.bashrc; complete -p clip-rd-edge"]
    shell = subprocess.run(command, env=outside, capture_output=True, text=True, check=False)
    assert shell.stderr == ""
    assert shell.stdout.split()[0] == "complete"
