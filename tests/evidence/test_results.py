from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from clip_rd_edge.benchmarking.metrics import difference_interval
from clip_rd_edge.evidence.suite import Difference, Evidence, RunResult, difference, runs_of, spread

from .conftest import IMAGES, Make, model_result


def difference_from_none(evidence: Evidence, method: str) -> Difference | None:
    return difference(runs_of(evidence, "test_vit", method), runs_of(evidence, "test_vit", "none"), [0])


def test_a_single_seed_has_no_deviation() -> None:
    assert spread([0.25]).deviation is None
    assert spread([1.0, 3.0]).deviation == pytest.approx(2**0.5)


def test_differences_use_the_seeds_that_both_methods_have(make: Make) -> None:
    result = difference_from_none(make({("none", 0): 4, ("none", 1): 10, ("clip-rd", 1): 13}), "clip-rd")
    assert result is not None
    assert (result.spread.count, result.spread.mean) == (1, pytest.approx(3 / IMAGES))
    assert difference_from_none(make({("none", 0): 4, ("clip-rd", 1): 13}), "clip-rd") is None


def test_more_seeds_on_the_same_images_do_not_narrow_the_interval(make: Make) -> None:
    one_seed = difference_from_none(make({("none", 0): 4, ("clip-rd", 0): 12}), "clip-rd")
    two_seeds = difference_from_none(
        make({(method, seed): n for method, n in (("none", 4), ("clip-rd", 12)) for seed in (0, 1)}), "clip-rd"
    )
    assert one_seed is not None
    assert two_seeds is not None
    assert one_seed.interval == two_seeds.interval
    ours, theirs = np.arange(IMAGES) < 12, np.arange(IMAGES) < 4
    assert one_seed.interval is not None
    assert one_seed.interval.low == pytest.approx(difference_interval(ours, theirs).low, abs=0.051)


@pytest.mark.parametrize("languages", [1, 2])
def test_an_interval_is_that_of_a_normal_distribution_around_the_mean_of_the_tasks(make: Make, languages: int) -> None:
    """Of many images, of a task that may be asked in two languages beside one with other images."""
    gains = random_hits(0.30), random_hits(0.05)
    blank = make({("none", 0): 0})

    def runs(hits: list[str]) -> dict[int, RunResult]:
        (task, _) = model_result("any", 0).tasks
        tasks = [
            replace(
                task,
                hits=digits,
                images=str(number > 0),
                score=replace(task.score, top1=digits.count("1") / len(digits)),
            )
            for number, digits in enumerate(hits)
            for _ in range(1 if number else languages)
        ]
        (run,) = blank.runs
        return {0: replace(run, result=replace(run.result, tasks=tuple(tasks)))}

    found = difference(runs(list(gains)), runs(["0" * len(gains[0])] * 2), range(languages + 1))
    assert found is not None
    assert found.interval is not None
    rates, weights = (
        [digits.count("1") / len(digits) for digits in gains],
        (languages / (languages + 1), 1 / (languages + 1)),
    )
    mean = sum(weight * rate for weight, rate in zip(weights, rates, strict=True))
    variance = sum(w**2 * rate * (1 - rate) / len(gains[0]) for w, rate in zip(weights, rates, strict=True))
    assert found.spread.mean == pytest.approx(mean)
    assert (found.interval.low + found.interval.high) / 2 == pytest.approx(mean, abs=0.1 * variance**0.5)
    assert found.interval.high - found.interval.low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.04)


def random_hits(rate: float) -> str:
    return "".join("01"[int(hit)] for hit in np.random.default_rng(0).random(5_000) < rate)
