"""What is seen of a long command while it starts and after Ctrl-C, in real processes: in a pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import PATIENCE_S

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
    "export": "m -o new/bundle",
    "quickstart": "-o new/quickstart",
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


def test_ctrl_c_on_a_terminal_leaves_no_progress_bar(colour_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    # So many that the command is never done before the signal arrives, and not so large that it could not end at once:
    # the threads that open them finish theirs, at a low priority.
    Image.new("RGB", (1000, 750), (200, 0, 0)).save(folder / "0.png")
    for number in range(1, 2500):
        os.link(folder / "0.png", folder / f"{number}.png")
    terminal, side = pty.openpty()
    command = [sys.executable, "-m", "clip_rd_edge", "index", str(colour_bundle), str(folder), "-o", "photos.index"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, cwd=tmp_path, env=environment, start_new_session=True
    )
    os.close(side)
    seen, deadline, interrupted = b"", time.monotonic() + PATIENCE_S, False
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                seen += os.read(terminal, 65536)
            except OSError:  # the other side is closed
                break
        if not interrupted and b"embedding" in seen:
            interrupted = True
            process.send_signal(signal.SIGINT)
    os.close(terminal)
    shown = seen.decode()
    assert process.wait(60) in (75, 130), shown
    assert "elapsed" in shown
    assert "\x1b[?25h" in shown  # the cursor is visible again
    assert "Traceback" not in shown
    # After the bar's line is cleared for the last time, only messages follow.
    rest = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.rpartition("\x1b[2K")[2])
    assert [line for line in rest.split("\r\n") if "elapsed" in line or "%" in line] == []
    assert "Interrupted" in rest
