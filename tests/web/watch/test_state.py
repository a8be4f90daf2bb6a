"""How far a run is, from its files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.lock import lock_content
from clip_rd_edge.web.watch.state import read_run

MakeRun = Callable[..., Path]


def test_a_run_at_work_has_a_time_left(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    (run / ".lock").write_text(lock_content(os.getpid()))
    state = read_run(run)
    assert (state.name, state.phase, state.step, state.steps) == ("first", "running", 20, 50)
    assert state.seconds_left == pytest.approx((50 - 20) * 0.5, abs=2)


def test_a_lock_that_cannot_be_read_is_held(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, plain = make_run(tmp_path / "first"), Path.read_text
    (run / ".lock").touch()
    os.utime(run / "metrics.jsonl", (0, time.time() - 3600))

    def read_text(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == ".lock":
            raise PermissionError(13, "Permission denied")
        return plain(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert read_run(run).phase == "running"


def test_a_run_without_its_lock_has_stopped(make_run: MakeRun, tmp_path: Path) -> None:
    state = read_run(make_run(tmp_path / "first"))
    assert (state.phase, state.seconds_left) == ("stopped", None)


def test_a_killed_run_has_stopped_although_its_lock_is_left(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    process = subprocess.Popen([sys.executable, "-c", ""])
    (run / ".lock").write_text(lock_content(process.pid))
    process.wait()
    assert read_run(run).phase == "running"  # on another machine, perhaps: it wrote a moment ago
    for name in ("metrics.jsonl", ".lock"):
        os.utime(run / name, (0, time.time() - 3600))
    assert read_run(run).phase == "stopped"


@pytest.mark.parametrize("origin", ["", "\nelsewhere", "\n81b8938f-338e-482b-9b72-b2fef03c9885 4123024"])
def test_another_process_of_the_same_number_does_not_work_on_a_killed_run(
    origin: str, make_run: MakeRun, tmp_path: Path
) -> None:
    """That of a container is often the first, and the first process of a machine always runs."""
    run = make_run(tmp_path / "first")
    (run / ".lock").write_text(f"{os.getpid()}{origin}")
    os.utime(run / "metrics.jsonl", (0, time.time() - 3600))
    assert read_run(run).phase == "running"  # resumed a moment ago, as its lock says
    os.utime(run / ".lock", (0, time.time() - 3600))
    assert read_run(run).phase == "stopped"


@pytest.mark.parametrize(("age_s", "phase"), [(0, "starting"), (3600, "stopped")])
def test_a_run_that_begins_elsewhere_is_starting_for_a_while(age_s: float, phase: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("1\nelsewhere")
    os.utime(tmp_path / ".lock", (0, time.time() - age_s))
    assert read_run(tmp_path).phase == phase


def test_a_finished_run_is_finished(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", logged=50)
    (run / "student").mkdir()
    (run / "student" / "open_clip_model.safetensors").touch()
    assert (read_run(run).phase, read_run(run).step) == ("finished", 50)


def test_a_run_that_has_only_begun_can_be_watched(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(lock_content(os.getpid()))
    state = read_run(tmp_path)
    assert (state.phase, state.step, state.steps, state.config, state.last) == ("starting", 0, None, None, {})


def test_the_steps_of_a_run_by_epochs_follow_from_its_pairs(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", steps=0)
    assert read_run(run).steps is None
    (run / "inputs.json").write_text('{"pairs": 42, "left_out": 0}')
    assert read_run(run).steps == 2 * 10


def test_the_last_line_is_the_last_with_a_loss(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step":22,"evaluation/x":0.5}\n{"step":23,"lo')  # the second is being written
    state = read_run(run)
    assert (state.step, state.last["step"]) == (22, 20)


def test_what_is_no_run_is_refused_and_the_runs_in_it_are_named(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing does not exist\."):
        read_run(tmp_path / "nothing")
    (tmp_path / "pairs.csv").touch()
    with pytest.raises(InputError, match=r"pairs\.csv is a file; expected its folder\."):
        read_run(tmp_path / "pairs.csv")
    with pytest.raises(InputError, match=r"has no config\.yaml\.") as raised:
        read_run(tmp_path)
    assert raised.value.hint == "pass the folder that distill writes to"
    for name in ("teacher", "student"):
        make_run(tmp_path / name)
    with pytest.raises(InputError) as raised:
        read_run(tmp_path)
    assert raised.value.hint == f"one of the runs in it: {tmp_path / 'student'}, {tmp_path / 'teacher'}"
