from __future__ import annotations

import sys
from pathlib import Path

import pytest

from clip_rd_edge.benchmarking.cold import measure_cold_start
from clip_rd_edge.cli._models import first_answer

# Not a model: answers after a while, holding some memory, and ends later.
PROGRAM = """
import sys, time
assert open(sys.argv[1], "rb").read() == b"picture"
time.sleep(0.1)
print('{"peak_memory_bytes": 7}', flush=True)
time.sleep(0.3)
"""


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(b"picture")
    return path


def test_from_launch_to_the_answer_and_not_to_the_end(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_rd_edge.benchmarking.cold._ENOUGH_SECONDS", 0.01)
    found = measure_cold_start([sys.executable, "-S", "-c", PROGRAM], picture)
    assert found is not None
    assert found.first_answer_s >= 0.1
    assert (found.runs, found.peak_memory_bytes) == (1, 7)


def test_a_process_that_fails_has_no_cold_start(picture: Path) -> None:
    assert measure_cold_start([sys.executable, "-S", "-c", "raise SystemExit(3)"], picture) is None


def test_a_bundle_answers_in_a_process_of_its_own(colour_bundle: Path, colour_pictures: Path) -> None:
    found = measure_cold_start(first_answer(str(colour_bundle), None, 1), colour_pictures / "red.png")
    assert found is not None
    assert found.first_answer_s > 0.01
    assert found.peak_memory_bytes is None or 10e6 < found.peak_memory_bytes < 2e9
