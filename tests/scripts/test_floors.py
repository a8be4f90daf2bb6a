from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.devices import floors


def test_the_table_says_what_ran_with_which_versions_and_why_not() -> None:
    outcomes = [
        floors.Outcome(python="3.10", releases="oldest", versions={"numpy": "1.26.0"}, error=""),
        floors.Outcome(python="3.10", releases="newest", versions={"numpy": "2.2.6", "rich": "15"}, error="it broke"),
    ]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in floors.table(outcomes).splitlines()]
    assert lines[0] == ["Python", "Releases", "numpy", "rich", "Runs"]
    assert lines[2:] == [["3.10", "oldest", "1.26.0", "", "yes"], ["3.10", "newest", "2.2.6", "15", "no: it broke"]]


def test_a_command_that_fails_is_reported_with_its_own_message() -> None:
    script = (
        "import sys; print('error: no such bundle', file=sys.stderr); print('hint: x', file=sys.stderr); sys.exit(2)"
    )
    with pytest.raises(RuntimeError, match=r"error: no such bundle$"):
        floors.run(sys.executable, "-c", script)


def test_an_environment_that_cannot_be_made_is_an_outcome_and_no_end(tmp_path: Path) -> None:
    missing = tmp_path / "no-python"
    outcome = floors.measure(missing, "3.10", "oldest", tmp_path, tmp_path)
    assert outcome.error
    assert outcome.versions == {}
