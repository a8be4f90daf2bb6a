"""What is seen of a long command while it starts and after Ctrl-C, in real processes: in a pipe and on a terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "onnxruntime", "open_clip", "matplotlib", "timm")
# Runs the command line in a process that ends as soon as a heavy package is imported, which takes seconds.
PROGRAM = f"""
import os, sys

class NoHeavyPackages:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
            sys.stderr.flush()
            os._exit(99)

sys.meta_path.insert(0, NoHeavyPackages())
sys.argv[0] = "clip-rd-edge"
from clip_rd_edge.cli.main import main
main()
"""
COMMANDS = {
    "distill": "--data emoji --student resnet18 --recipe clip -o new/run",
    "evidence run": "method-evidence -o new/evidence",
    "verify": "bundle",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_long_command_prints_a_line_before_its_long_imports(command: str, tmp_path: Path) -> None:
    arguments = [*command.split(), *COMMANDS[command].split()]
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert process.stderr.splitlines()[0] == f"· starting {command}"
