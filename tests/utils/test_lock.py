from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils.lock import only_writer


def test_a_second_writer_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with only_writer(folder):
        with pytest.raises(UsageError, match=rf"is being written by another run, process {os.getpid()}\."):
            only_writer(folder).__enter__()
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    with only_writer(folder):
        pass


def test_a_folder_that_stayed_empty_goes(tmp_path: Path) -> None:
    with only_writer(tmp_path / "folder"):
        pass
    assert not (tmp_path / "folder").exists()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from clip_rd_edge.utils.lock import only_writer\n"
        "with only_writer(Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == 9
    assert (tmp_path / ".lock").exists()
    with only_writer(tmp_path):
        pass
