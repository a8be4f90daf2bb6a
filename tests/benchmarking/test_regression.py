"""Two runs of one suite, as a machine gives them: it drifts, stutters, and lays models out anew in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from clip_rd_edge.benchmarking import latency
from clip_rd_edge.benchmarking.latency import Latencies
from clip_rd_edge.benchmarking.regression import Changes, compare_runs
from clip_rd_edge.benchmarking.results import Results, SkippedRow
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils import timing

SCALES = {"Teacher": 9.0, "Alone": 8.0, "Student": 8.0, "FP32": 3.0, "INT8": 1.0}


class FakeClock:
    """Time that passes only where the test says so."""

    def __init__(self) -> None:
        self.now = 0.0  # seconds

    def perf_counter(self) -> float:
        return self.now

    def perf_counter_ns(self) -> int:
        return round(1e9 * self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClock]:
    fake = FakeClock()
    monkeypatch.setattr(timing, "time", fake)
    yield fake
    assert fake.now > 0
    assert time.perf_counter() > 0


Machine = Callable[[], float]  # how much longer than usual the next call takes


def timed(results: Results, clock: FakeClock, picture: Path, open_fake: Any, noise: Machine, slow: str = "") -> Results:
    """The same results with latencies of a simulated machine; the model `slow` takes 15 % longer."""
    rows = {}
    for row in results.rows:
        encoder = open_fake(row.model)
        seconds = SCALES[row.label] / 1000 * (1.15 if row.label == slow else 1)
        for name in ("encode_pixels", "encode_ids"):
            plain = getattr(encoder, name)
            setattr(encoder, name, lambda inputs, plain=plain, s=seconds: (tick(clock, s * noise()), plain(inputs))[1])
        rows[row.label] = encoder
    original = latency.reference_call
    latency.reference_call = lambda threads: lambda: tick(clock, 0.002 * noise())
    try:
        found: Latencies = latency.measure_latencies(rows, picture, threads=1, rounds=100)
    finally:
        latency.reference_call = original
    measured = tuple(msgspec.structs.replace(row, latency=found.rows[row.label]) for row in results.rows)
    return msgspec.structs.replace(results, rows=measured, reference=found.reference, other_load=None)


def tick(clock: FakeClock, seconds: float) -> None:
    clock.now += seconds


def steady() -> float:
    return 1.0


def real(seed: int, clock: FakeClock, pace: float) -> Machine:
    """Noise like a shared server's: each call a little off, some far off, and a pace that wanders within the run."""
    rng = np.random.default_rng(seed)

    def draw() -> float:
        wandering = 1 + 0.06 * np.sin(clock.now / 3 + seed)
        stutter = 3.0 if rng.random() < 0.02 else 1.0
        return float(pace * wandering * stutter * np.exp(rng.normal(0, 0.04)))

    return draw


def verdicts(changes: Changes) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for each in changes.latencies:
        found.setdefault(each.row, set()).add(each.verdict)
    return found


def test_a_build_that_is_15_percent_slower_is_caught(
    results: Results, clock: FakeClock, pictures: dict[str, Path], open_fake: Any
) -> None:
    before = timed(results, clock, pictures["red"], open_fake, steady)
    after = timed(results, clock, pictures["red"], open_fake, steady, slow="INT8")
    changes = compare_runs(before, after)
    assert verdicts(changes)["INT8"] == {"regression"}
    assert {verdict for row, seen in verdicts(changes).items() if row != "INT8" for verdict in seen} == {"noise"}
    assert [each.change for each in changes.latencies if each.row == "INT8"] == pytest.approx([0.15] * 3)
    assert changes.regressions == 3
    back = compare_runs(after, before)
    assert (back.regressions, verdicts(back)["INT8"]) == (0, {"improvement"})


def test_on_a_real_machine_slow_is_told_from_noise(
    results: Results, clock: FakeClock, pictures: dict[str, Path], open_fake: Any
) -> None:
    first = timed(results, clock, pictures["red"], open_fake, real(0, clock, 1.0))
    second = timed(results, clock, pictures["red"], open_fake, real(1, clock, 1.08))  # the machine is slower
    honest = compare_runs(first, second)
    assert honest.regressions == 0
    assert max(each.noise for each in honest.latencies) < 0.15
    assert any("The machine itself was" in remark and "slower" in remark for remark in honest.remarks)
    raw = [each.new_ms / each.old_ms for each in honest.latencies]
    assert np.median(raw) > 1.05
    assert abs(np.median([each.change for each in honest.latencies])) < 0.02
    slow = timed(results, clock, pictures["red"], open_fake, real(2, clock, 0.95), slow="Student")
    assert verdicts(compare_runs(first, slow))["Student"] == {"regression"}


def test_accuracy_is_paired(results: Results) -> None:
    *others, int8 = results.rows
    (marks,) = int8.marks
    assert marks.count == 12
    assert marks.hits().mean() == int8.scores[0].top1  # type: ignore[union-attr]
    none = msgspec.structs.replace(int8, marks=(msgspec.structs.replace(marks, bits=bytes(len(marks.bits))),))
    worse = msgspec.structs.replace(results, rows=(*others, none))
    changes = compare_runs(results, worse)
    (lost,) = (each for each in changes.accuracies if each.verdict != "same")
    assert (lost.row, lost.new, lost.verdict) == ("INT8", 0, "regression")
    assert lost.interval.high < 0
    assert compare_runs(worse, results).accuracies[-1].verdict == "improvement"
    assert [each.verdict for each in compare_runs(results, results).accuracies] == ["same"] * 5


def test_other_questions_are_not_paired(results: Results) -> None:
    rows = tuple(
        msgspec.structs.replace(row, marks=tuple(msgspec.structs.replace(m, questions="others") for m in row.marks))
        for row in results.rows
    )
    changes = compare_runs(results, msgspec.structs.replace(results, rows=rows))
    assert changes.accuracies == ()
    assert "no task has the same questions in both runs: Teacher, Alone" in " ".join(changes.remarks)


def test_a_model_that_is_lost_is_a_regression(results: Results) -> None:
    gone = SkippedRow(label="INT8", model="int8", reason="There is no model folder int8.")
    fewer = msgspec.structs.replace(results, rows=results.rows[:-1], skipped=(gone,))
    changes = compare_runs(results, fewer)
    assert changes.lost == {"INT8": "There is no model folder int8."}
    assert changes.regressions == 1


def test_latencies_of_other_machines_and_old_results_are_left_alone(results: Results) -> None:
    results = msgspec.structs.replace(results, other_load=None)
    other = msgspec.structs.replace(results.environment, machine="Abacus, 2 cores")
    changes = compare_runs(results, msgspec.structs.replace(results, environment=other))
    assert changes.latencies == ()
    assert "would not be seen" not in " ".join(changes.remarks)
    assert "the machines differ" in changes.remarks[0]
    assert compare_runs(msgspec.structs.replace(results, reference=None), results).latencies == ()


def test_a_busy_machine_tells_nothing_of_latency(results: Results) -> None:
    busy = msgspec.structs.replace(results, other_load=0.5)
    idle = msgspec.structs.replace(results, other_load=0.1)
    changes = compare_runs(idle, busy)
    assert changes.latencies == ()
    assert "other processes took 50\u00a0% of the machine during the new run" in changes.remarks[0]
    (remark,) = (each for each in compare_runs(idle, idle).remarks if "old run" in each)
    assert "10\u00a0%" in remark


def test_a_run_that_is_too_noisy_says_so(results: Results) -> None:
    results = msgspec.structs.replace(results, other_load=None)

    def shaken(row: Any) -> Any:
        image = msgspec.structs.replace(row.latency.image, sittings=(1.0, 3.0))
        return msgspec.structs.replace(row, latency=msgspec.structs.replace(row.latency, image=image))

    reference = msgspec.structs.replace(results.reference, image=(1.0, 1.0))
    noisy = msgspec.structs.replace(results, rows=tuple(map(shaken, results.rows)), reference=reference)
    assert "a change of 15\u00a0% would not be seen" in " ".join(compare_runs(noisy, noisy).remarks)


def test_nothing_in_common(results: Results) -> None:
    renamed = tuple(msgspec.structs.replace(row, label=f"My {row.label}") for row in results.rows)
    with pytest.raises(InputError, match="no model in common: Teacher, Alone"):
        compare_runs(results, msgspec.structs.replace(results, rows=renamed))
