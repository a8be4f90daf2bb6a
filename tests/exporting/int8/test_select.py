from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.exporting.int8.candidates import GroupError, layers_within, with_fewest_in_float
from clip_rd_edge.exporting.int8.search import Choice, MeasuredCandidate, Trial, choose
from clip_rd_edge.exporting.parity import Agreement
from clip_rd_edge.exporting.plan import Budget


def _measured(name: str, latency_ms: float, cosine: float = 1.0, size: int = 100, **answers: int) -> MeasuredCandidate:
    return MeasuredCandidate(name, np.full(9, latency_ms), Agreement(0.0, 1.0, cosine, 200), size, **answers)


def _choose(*tried: MeasuredCandidate) -> Choice:
    return choose("image", _measured("float32", 10, size=400), tried, budget=Budget())


def test_the_fastest_accurate_candidate_is_shipped() -> None:
    choice = _choose(_measured("fast and wrong", 1, 0.5), _measured("good", 3, 0.992), _measured("slow", 8, 0.999))
    assert choice.name == "good"
    assert choice.note == ""
    verdicts = {trial.name: trial.verdict for trial in choice.trials}
    assert verdicts == {"fast and wrong": "below 0.99", "good": "shipped", "slow": "another is better"}


def test_the_text_tower_has_to_agree_more_closely() -> None:
    tried = [_measured("a", 3, 0.992)]
    names = [
        choose(tower, _measured("float32", 10, size=400), tried, budget=Budget()).name for tower in ("image", "text")
    ]
    assert names == ["a", None]


def test_among_equally_fast_candidates_the_smaller_then_the_more_accurate_is_shipped() -> None:
    assert _choose(_measured("a", 3.0, 0.992), _measured("b", 3.1, 0.998)).name == "b"
    assert _choose(_measured("a", 3.0, 0.998, size=380), _measured("b", 3.1, 0.992, size=100)).name == "b"
    tried = _measured("a", 3.0, 0.9992), _measured("b", 3.6, 0.9998)
    assert _choose(*tried).name == "a"
    # A text is embedded once, so its tower may take longer for accuracy.
    assert choose("text", _measured("float32", 10, size=400), tried, budget=Budget()).name == "b"


def test_a_tower_that_is_slower_and_less_accurate_is_never_shipped() -> None:
    choice = _choose(_measured("slower", 10.5, 0.999), _measured("much slower", 20, 0.9999))
    assert choice.name is None
    assert "none of 2 INT8 candidates is worth shipping" in choice.note
    assert "(slower: slower than float32) took 1.05 times as long, with a centred cosine of 0.9990" in choice.note
    assert {trial.verdict for trial in choice.trials} == {"slower than float32"}


def test_the_note_names_the_most_accurate_of_the_faster_candidates() -> None:
    choice = _choose(_measured("x", 2, 0.5), _measured("y", 5, 0.985), _measured("z", 11, 0.97))
    assert choice.name is None
    assert "(y: below 0.99) took 0.50 times as long, with a centred cosine of 0.9850" in choice.note
    assert choice.trials[2].verdict == "slower than float32 and below 0.99"


def test_a_much_smaller_candidate_is_shipped_if_none_is_faster() -> None:
    small = _measured("token embeddings only", 10.1, 0.9999, size=200)
    assert _choose(small).name == "token embeddings only"
    assert _choose(small, _measured("good", 5, 0.995, size=150)).name == "good"
    assert _choose(_measured("no smaller", 10.1, 0.9999, size=390)).name is None
    assert _choose(_measured("slower", 10.4, 0.9999, size=200)).name is None


def test_a_loss_of_zero_shot_accuracy_counts_unless_chance_explains_it() -> None:
    assert _choose(_measured("three of three", 3, 0.995, lost=3)).name == "three of three"
    assert _choose(_measured("even", 3, 0.995, lost=12, gained=10)).name == "even"
    choice = _choose(_measured("four of four", 3, 0.995, lost=4))
    assert (choice.name, choice.trials[0].verdict) == (None, "loses 2.0 points")
    assert _choose(_measured("twelve of sixteen", 3, 0.995, lost=12, gained=4)).trials[0].loss_points == 4
    assert _choose(_measured("twelve of sixteen", 3, 0.995, lost=12, gained=4)).name is None
    tolerant = choose("image", _measured("float32", 10), [_measured("a", 3, lost=4)], budget=Budget(max_loss=5))
    assert tolerant.name == "a"


def test_without_pairs_no_loss_is_measured_and_none_objected_to() -> None:
    choice = choose("image", _measured("float32", 10), [_measured("a", 3, 0.995)], budget=Budget(max_loss=0))
    assert choice.name == "a"
    assert np.isnan(choice.trials[0].loss_points)


def test_a_trial_has_ratios_to_float32() -> None:
    (trial,) = _choose(_measured("a", 2.5, 0.995, size=100)).trials
    assert (trial.latency_ratio, trial.size_ratio, trial.centred_cosine) == (0.25, 0.25, 0.995)


def test_the_note_names_the_loss_of_a_candidate_that_is_fast_and_agrees() -> None:
    tried = _measured("too slow to pay", 9.8, 0.9999, size=390), _measured("lossy", 5, 0.995, lost=20)
    assert "the nearest (lossy: loses 10.0 points) took 0.50 times" in _choose(*tried).note


def test_without_candidates_float32_is_shipped_for_the_first_ones_reason() -> None:
    assert _choose().name is None
    nan = float("nan")
    failed = [
        Trial(tower="image", name=name, latency_ratio=nan, centred_cosine=nan, size_ratio=nan, loss_points=nan,
              verdict=f"failed: {reason}")
        for name, reason in (("static, min-max", "no mapping"), ("static, entropy", "no"))
    ]  # fmt: skip
    choice = choose("image", _measured("float32", 10), [], budget=Budget(), left_out=failed)
    assert choice.note == "float32: the tower could not be converted to INT8: static, min-max failed: no mapping."
    assert choice.trials == tuple(failed)


def test_the_worst_layers_are_excluded_until_the_error_is_small_enough() -> None:
    errors = [GroupError((name,), error) for name, error in (("a", 0.001), ("b", 0.02), ("c", 0.002), ("d", 0.004))]
    assert layers_within(errors, 0.1) == ("a", "b", "c", "d")
    assert layers_within(errors, 0.008) == ("a", "c", "d")
    assert layers_within(errors, 0.003) == ("a", "c")
    assert layers_within([GroupError(("a",), float("inf"))], 1.0) == ()


def test_the_fewest_layers_stay_in_float_with_which_the_measured_error_is_small_enough() -> None:
    errors = [GroupError((name,), error) for name, error in (("a", 0.001), ("b", 0.02), ("c", 0.002), ("d", 0.01))]
    reference = np.eye(2, 8, dtype=np.float32)
    # Together, the errors are others than their sums: `c` without `d` does more harm than both.
    true = {"abcd": 0.05, "acd": 0.02, "ac": 0.004, "a": 0.0005}
    tried = []

    def embed_with(layers: Sequence[str]) -> Embeddings:
        tried.append("".join(layers))
        error = true[tried[-1]]
        rotated = reference * (1 - error)
        rotated[:, 2] = [np.sqrt(0.5 - 0.5 * (1 - error) ** 2), -np.sqrt(0.5 - 0.5 * (1 - error) ** 2)]
        return rotated

    limits = [0.03, 0.0045, 0.001]
    assert with_fewest_in_float(errors, embed_with, reference, limits, max_seconds=60) == [
        ("a", "c", "d"), ("a", "c"), ("a",),
    ]  # fmt: skip
    assert tried == ["abcd", "acd", "ac", "a"]
    # Without the time to measure, the sums decide.
    assert with_fewest_in_float(errors, embed_with, reference, limits, max_seconds=0) == [
        ("a", "c", "d"), ("a", "c"), ("a",),
    ]  # fmt: skip
