"""Short forms of the soak: servers among bad clients, and training that meets faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.robustness import soak

pytest.importorskip("starlette")


@pytest.mark.slow
def test_good_clients_are_answered_among_bad_ones(tmp_path: Path) -> None:
    figures = soak.soak_servers(30, tmp_path)
    assert max(figures["memory_growth"].values()) < 0.15  # in the first half minute; 5 % later
    for kind, clients in figures["good_clients"].items():
        assert clients["answers"].keys() == {"200"}, kind
        assert clients["answers"]["200"] > 20, kind
    assert max(figures["log_bytes"].values()) < 100_000


@pytest.mark.slow
def test_training_that_meets_faults_ends_with_the_same_weights(tmp_path: Path) -> None:
    figures = soak.soak_training(80, tmp_path, every=20, steps=160)
    assert sum(figures["faults"].values()) >= 2
    assert figures["errors"] == []
    assert figures["left_over"] == []
    assert figures["same_weights_as_without_faults"] == [True] * figures["runs"]
