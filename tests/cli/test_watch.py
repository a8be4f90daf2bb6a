"""The command that shows how a run goes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "first"
    folder.mkdir()
    recipe = "recipe_name: clip\nrecipe: {steps: 50, epochs: 2, batch_size: 4}\n"
    (folder / "config.yaml").write_text(f"{recipe}data: pairs.csv\nstudent: x\n")
    (folder / "metrics.jsonl").write_text('{"step":10,"loss":2.5,"samples_per_second":8.0}\n')
    return folder


def test_the_page_is_written_into_a_file(command_line: Run, run: Path, tmp_path: Path) -> None:
    files = sorted(run.iterdir())
    code, output, error = command_line("watch", run, "--no-answers", "-o", tmp_path / "page.html")
    assert (code, output, error) == (0, f"{tmp_path / 'page.html'}\n", "· starting watch\n")
    assert "10 of 50 steps" in (tmp_path / "page.html").read_text()
    assert sorted(run.iterdir()) == files


def test_the_page_replaces_only_an_earlier_one(command_line: Run, run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for _ in range(2):
        assert command_line("watch", run, "--no-answers", "-o", page)[0] == 0
    page.write_text("<!doctype html>\n<title>My home page</title>")
    code, _, error = command_line("watch", run, "--no-answers", "-o", page)
    assert (code, "page.html is not replaced: it exists, and is not an earlier page" in error) == (2, True)
    assert "My home page" in page.read_text()


def test_the_page_is_served_until_ctrl_c(run: Path) -> None:
    command = [sys.executable, "-m", "clip_rd_edge", "watch", str(run), "--no-answers", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
            with urllib.request.urlopen(url, timeout=60) as response:
                assert "10 of 50 steps" in response.read().decode()
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode in (0, 130, -signal.SIGINT)
    assert "Traceback" not in error
    assert error.startswith("· starting watch\nPress Ctrl-C to stop.\n")


def test_without_pytorch_the_page_says_what_the_answers_need(
    command_line: Run, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "clip_rd_edge.distillation.monitoring.answers", None)
    code, _, _ = command_line("watch", run, "-o", tmp_path / "page.html")
    assert code == 0
    page = (tmp_path / "page.html").read_text()
    assert "Sample answers need PyTorch: pip install" in page
    assert "10 of 50 steps" in page


def test_wrong_input_is_reported_before_anything_is_served(command_line: Run, run: Path) -> None:
    code, _, error = command_line("watch", run, "--task", "nothing")
    assert code == 2
    assert "No task named 'nothing'" in error
    code, _, error = command_line("watch", run.parent)
    assert code == 2
    assert f"hint: one of the runs in it: {run}{os.linesep}" in error
