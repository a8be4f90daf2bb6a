from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils.lock import exclusive_writer


def test_a_second_writer_is_refused_with_the_holders_process_id(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with exclusive_writer(folder):
        with pytest.raises(UsageError, match=rf"is being written by another run, process {os.getpid()}\."):
            exclusive_writer(folder).__enter__()
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    with exclusive_writer(folder):
        pass


def test_a_new_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    with exclusive_writer(tmp_path / "folder"):
        pass
    assert not (tmp_path / "folder").exists()


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from clip_rd_edge.utils.lock import exclusive_writer\n"
        "with exclusive_writer(Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == 9
    assert (tmp_path / ".lock").exists()
    with exclusive_writer(tmp_path):
        pass


def test_a_writer_that_may_wait_says_so_once_and_goes_on_when_the_first_ends(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    said: list[str] = []
    order: list[str] = []

    def second() -> None:
        with exclusive_writer(folder, on_wait=said.append):
            order.append("second")

    thread = threading.Thread(target=second)
    with exclusive_writer(folder):
        thread.start()
        time.sleep(0.5)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert said == [f"{folder} is being written by another run, process {os.getpid()}: waiting for it"]
