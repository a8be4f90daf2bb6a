"""After an operation on a file or a socket that fails, nothing half-written counts, and the next run recovers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.data.unreliable_server import UnreliableServer
from benchmarks.robustness.faults import (
    MODES,
    OPERATIONS,
    SOCKET,
    BenchmarkScenario,
    BundleScenario,
    CheckpointScenario,
    IndexScenario,
    RemoteScenario,
    Scenario,
    ShardScenario,
    until_untouched,
)


def test_shards_are_read_whichever_call_of_a_socket_fails(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "scratch").mkdir()
    with UnreliableServer().running() as server:
        outcome = until_untouched(RemoteScenario(server), SOCKET, "error", tmp_path / "scratch")
    assert outcome.problems == ()
    assert outcome.faults > 4
    assert outcome.reported == 0  # each is made up for by another try


@pytest.fixture
def scenario(request: pytest.FixtureRequest, colour_bundle: Path) -> Scenario:
    kind = request.param
    return kind(colour_bundle) if kind in (BundleScenario, IndexScenario) else kind()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "scenario",
    [BundleScenario, CheckpointScenario, IndexScenario, ShardScenario, BenchmarkScenario],
    ids=["bundle", "checkpoint", "index", "shards", "benchmark"],
    indirect=True,
)
def test_nothing_is_lost_whichever_operation_fails(
    scenario: Scenario, operation: str, mode: str, tmp_path: Path
) -> None:
    (tmp_path / "scratch").mkdir()
    outcome = until_untouched(scenario, operation, mode, tmp_path / "scratch")
    assert outcome.problems == ()
    assert outcome.faults or operation in ("read", "fsync", "rename")
