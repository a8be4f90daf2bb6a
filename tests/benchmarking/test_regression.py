"""Comparison of two runs of a suite, on a simulated machine whose speed drifts and whose calls stutter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from clip_rd_edge.benchmarking import latency
from clip_rd_edge.benchmarking.regression import (
    RELOAD_DEVIATION,
    Changes,
    change_noise,
    compare_runs,
    pooled_deviation,
    relative_change,
)
from clip_rd_edge.benchmarking.results import Results, SkippedRow
from clip_rd_edge.utils import timing

SCALES = {"Teacher": 9.0, "Alone": 8.0, "Student": 8.0, "FP32": 3.0, "INT8": 1.0}


class FakeClock:
    """A clock that only advances when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0  # seconds

    def perf_counter(self) -> float:
        return self.now

    def perf_counter_ns(self) -> int:
        return round(1e9 * self.now)

    def tick(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClock]:
    fake = FakeClock()
    monkeypatch.setattr(timing, "time", fake)
    yield fake
    assert fake.now > 0
    assert time.perf_counter() > 0


Machine = Callable[[], float]  # how much longer than usual the next call takes, as a factor
Simulate = Callable[..., Results]


@pytest.fixture
def simulate(
    results: Results, clock: FakeClock, squares: dict[str, Path], open_fake: Any, monkeypatch: Any
) -> Simulate:
    """Return a function that measures latencies on a simulated machine; the model `slow` takes 15 % longer."""

    def simulated(machine: Machine = lambda: 1.0, slow: str = "", rounds: int = 100) -> Results:
        def timed(seconds: float, call: Callable[..., Any] = lambda: None) -> Callable[..., Any]:
            return lambda *inputs: (clock.tick(seconds * machine()), call(*inputs))[1]

        encoders = {}
        for row in results.rows:
            encoder = encoders[row.label] = open_fake(row.model)
            seconds = SCALES[row.label] / 1000 * (1.15 if row.label == slow else 1)
            for name in ("encode_pixels", "encode_ids"):
                setattr(encoder, name, timed(seconds, getattr(encoder, name)))
        monkeypatch.setattr(latency, "reference_call", lambda threads: timed(0.002))
        measured = latency.measure_latencies(encoders, squares["red"], threads=1, rounds=rounds)
        rows = tuple(replace(row, latency=measured.rows[row.label]) for row in results.rows)
        return replace(results, rows=rows, reference=measured.reference, other_load=None)

    return simulated


def noisy_machine(seed: int, clock: FakeClock, slowdown: float) -> Machine:
    """Simulate a shared server: every call varies a little, some a lot, and the speed drifts during the run."""
    rng = np.random.default_rng(seed)

    def next_factor() -> float:
        drift = 1 + 0.06 * np.sin(clock.now / 3 + seed)
        stutter = 3.0 if rng.random() < 0.02 else 1.0
        return float(slowdown * drift * stutter * np.exp(rng.normal(0, 0.04)))

    return next_factor


def verdicts(changes: Changes) -> dict[str, set[str]]:
    by_row: dict[str, set[str]] = {}
    for change in changes.latencies:
        by_row.setdefault(change.row, set()).add(change.verdict)
    return by_row


def test_a_slowdown_by_15_percent_is_a_regression(simulate: Simulate) -> None:
    before, after = simulate(), simulate(slow="INT8")
    changes = compare_runs(before, after)
    assert verdicts(changes) == {label: {"regression" if label == "INT8" else "noise"} for label in SCALES}
    assert [change.change for change in changes.latencies if change.row == "INT8"] == pytest.approx([0.15] * 3)
    assert changes.regressions == 3
    reverse = compare_runs(after, before)
    assert (reverse.regressions, verdicts(reverse)["INT8"]) == (0, {"improvement"})


def test_a_slowdown_is_distinguished_from_noise_on_a_noisy_machine(simulate: Simulate, clock: FakeClock) -> None:
    first = simulate(noisy_machine(0, clock, 1.0))
    unchanged = compare_runs(first, simulate(noisy_machine(1, clock, 1.08)))  # the machine is slower
    assert {change.verdict for change in unchanged.latencies} == {"noise"}
    assert max(change.noise for change in unchanged.latencies) < 0.15
    assert any("The machine itself was" in remark and "slower" in remark for remark in unchanged.remarks)
    assert np.median([change.new_ms / change.old_ms for change in unchanged.latencies]) > 1.05
    assert abs(np.median([change.change for change in unchanged.latencies])) < 0.02
    slow = simulate(noisy_machine(2, clock, 0.95), slow="Student")
    assert verdicts(compare_runs(first, slow))["Student"] == {"regression"}


def test_accuracy_is_compared_in_pairs(results: Results) -> None:
    teacher, *others = results.rows
    (correctness,) = teacher.correctness
    assert correctness.count == 12
    assert correctness.hits().mean() == teacher.scores[0].top1  # type: ignore[union-attr]
    all_wrong = replace(correctness, bits=bytes(len(correctness.bits)))
    worse = replace(results, rows=(replace(teacher, correctness=(all_wrong,)), *others))
    changes = compare_runs(results, worse)
    (lost,) = (change for change in changes.accuracies if change.verdict != "same")
    assert (lost.row, lost.new, lost.verdict) == (teacher.label, 0, "regression")
    assert lost.interval.high < 0
    assert compare_runs(worse, results).accuracies[0].verdict == "improvement"
    assert [change.verdict for change in compare_runs(results, results).accuracies] == ["same"] * 5


def test_the_more_accuracies_are_compared_the_larger_a_loss_must_be(results: Results) -> None:
    def with_misses(misses: int) -> Results:
        hits = np.ones(200, dtype=np.bool_)
        rows = []
        for row in results.rows:
            hits[:misses] = row.label != "INT8"
            bits = np.packbits(hits).tobytes()
            answers = tuple(replace(c, count=len(hits), bits=bits) for c in row.correctness[:1])
            rows.append(replace(row, correctness=answers))
        return replace(results, rows=tuple(rows))

    def verdict(old: Results, new: Results) -> str:
        (change,) = (change for change in compare_runs(old, new).accuracies if change.row == "INT8")
        return change.verdict

    before, after = with_misses(0), with_misses(7)
    assert len(compare_runs(before, after).accuracies) == 5
    assert verdict(before, after) == "noise"
    assert verdict(before, with_misses(20)) == "regression"
    alone = [replace(run, rows=run.rows[-1:]) for run in (before, after)]
    assert verdict(*alone) == "regression"
    alone[1] = replace(after, rows=with_misses(4).rows[-1:])
    assert verdict(*alone) == "noise"  # 4 of 4 changed answers go one way in one of 8 cases


@pytest.mark.parametrize("other", ["questions", "images", "measure"])
def test_answers_to_other_examples_are_not_compared(results: Results, other: str) -> None:
    rows = tuple(replace(row, correctness=(replace(*row.correctness, **{other: "others"}),)) for row in results.rows)
    changes = compare_runs(results, replace(results, rows=rows))
    assert (changes.accuracies, changes.uncompared, changes.regressions) == ((), ("task",), 0)
    assert "Accuracy on task is not compared: the two runs have other images" in " ".join(changes.remarks)


def test_a_lost_model_is_a_regression(results: Results) -> None:
    skipped = SkippedRow(label="INT8", model="int8", reason="There is no model folder int8.")
    fewer = replace(results, rows=results.rows[:-1], skipped=(skipped,))
    changes = compare_runs(results, fewer)
    assert changes.lost == {"INT8": "There is no model folder int8."}
    assert changes.regressions == 1


@pytest.mark.parametrize(
    ("before", "after", "obstacle"),
    [
        ({"machine": "Abacus"}, {"machine": "Slide rule"}, "the machines differ, Abacus and Slide rule"),
        ({"instruction_sets": ("A",)}, {"instruction_sets": ("A", "B")}, "the instruction sets of the machines differ"),
        ({"instruction_sets": ("A",)}, {"instruction_sets": ()}, ""),
        ({"threads": 1}, {"threads": 4}, "the numbers of threads differ, 1 and 4"),
        ({"other_load": 0.1}, {"other_load": 0.5}, "other processes used 50\u00a0% of the machine during the new run"),
    ],
)
def test_latencies_are_compared_in_the_same_circumstances_alone(
    results: Results, before: dict[str, Any], after: dict[str, Any], obstacle: str
) -> None:
    def measured(changes: dict[str, Any]) -> Results:
        load, threads = changes.get("other_load"), changes.get("threads", 1)
        own = {name: value for name, value in changes.items() if name in ("machine", "instruction_sets")}
        environment = replace(results.environment, **own)
        suite = replace(results.suite, threads=threads)
        return replace(results, suite=suite, environment=environment, other_load=load)

    changes = compare_runs(measured(before), measured(after))
    assert bool(changes.latencies) is not bool(obstacle)
    assert obstacle in " ".join(changes.remarks)
    assert not (obstacle and "too noisy" in " ".join(changes.remarks))


def test_blocks_of_one_model_that_agree_by_chance_have_the_noise_of_all_models() -> None:
    scattered, alike = np.asarray([0.0, 0.1, -0.1, 0.05, -0.05]), np.full(5, 0.02)
    pooled = pooled_deviation([scattered, alike, scattered, alike])
    assert pooled == pytest.approx(np.sqrt(2 * (scattered**2).sum() / 16))
    alone, among_others = change_noise(alike, alike), change_noise(alike, alike, pooled=pooled)
    assert alone == pytest.approx(np.expm1(3.5 * np.sqrt(2) * RELOAD_DEVIATION))
    assert among_others > 3 * alone


def test_a_disturbed_block_is_no_change() -> None:
    assert relative_change(np.zeros(5), np.asarray([0, 0, 0, 0, 2.0])) == 0
    assert relative_change(np.zeros(5), np.log([1.5, 1.5, 1.5, 1.5, 9])) == pytest.approx(0.5)
