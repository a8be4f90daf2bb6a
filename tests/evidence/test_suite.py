from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from support import assert_form

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.evidence.run import run_config
from clip_rd_edge.evidence.suite import (
    Difference,
    Evidence,
    EvidenceSuite,
    RunResult,
    difference,
    read_evidence,
    runs_of,
)
from clip_rd_edge.utils.files import write_text
from clip_rd_edge.utils.structs import to_yaml

from .conftest import IMAGES, Make, model_result


def test_the_shipped_suite_trains_all_runs_with_the_same_settings() -> None:
    suite = read_evidence("method-evidence")
    runs = list(suite.runs())
    assert len(runs) == 60
    # Complete tables after a fifth of the runs.
    assert [run.seed for run in runs] == [seed for seed in range(5) for _ in range(12)]
    assert len({run.subfolder for run in runs}) == 60
    configs = [run_config(suite, run, teacher="t", stores=Path("c")) for run in runs]
    settings = {
        (c.recipe.steps, c.recipe.batch_size, c.recipe.learning_rate, c.recipe.precision, c.views) for c in configs
    }
    assert settings == {(suite.steps, suite.batch_size, suite.learning_rate, suite.precision, suite.views)}


def test_a_text_tower_of_a_model_keeps_its_context_length(suite: EvidenceSuite, tmp_path: Path) -> None:
    run, lengths = next(suite.runs()), []
    write_text(tmp_path / "open_clip_config.json", "{}")
    for text in (None, str(tmp_path), "teacher"):
        method = replace(run.method, text=text)
        config = run_config(suite, dataclasses.replace(run, method=method), teacher="t", stores=Path("c"))
        lengths.append(config.context_length)
    assert lengths == [suite.context_length, None, None]  # the model's


def test_a_method_has_terms_and_a_text_tower_of_its_own(suite: EvidenceSuite) -> None:
    none, full, without = (suite.recipe(method, suite.students[0]).objective for method in suite.methods)
    assert (list(none), full.keys() - without.keys()) == (["task"], {"xrd"})
    run = next(run for run in suite.runs() if run.method.name == "clip-rd")
    for field, value in {"pretrained_text": "tokens", "freeze_text_layers": 2, "text": "runs/trimmed"}.items():
        own = dataclasses.replace(run, method=replace(run.method, **{field: value}))
        assert getattr(run_config(suite, own, teacher="t", stores=Path("c")), field) == value


def test_a_method_can_take_other_steps_with_one_student(suite: EvidenceSuite) -> None:
    method = replace(suite.methods[0], steps={"resnet10t": suite.steps + 5})
    both = replace(suite, students=("resnet10t", "mobilevit_xxs"), methods=(method,), compare_with=())
    steps = {run.student: run_config(both, run, teacher="t", stores=Path("c")).recipe.steps for run in both.runs()}
    assert steps == {"resnet10t": suite.steps + 5, "mobilevit_xxs": suite.steps}
    with pytest.raises(ValueError, match="steps of the method"):  # of a student which the suite does not train
        replace(suite, methods=(method,), compare_with=())


@pytest.mark.parametrize("student", ["/home/me/mine.json", "../a.json", r"C:\students\mine.json"])
def test_runs_of_any_student_lie_in_the_suites_folder(suite: EvidenceSuite, student: str) -> None:
    _, folder, *_ = next(replace(suite, students=(student,)).runs()).subfolder.parts
    assert not {"/", "\\", ":"} & set(folder)
    assert not folder.startswith(".")


def test_a_method_without_a_teacher_gets_none(suite: EvidenceSuite) -> None:
    configs = {
        run.method.name: run_config(suite, run, teacher="t", stores=Path("c")) for run in suite.runs() if run.seed == 1
    }
    assert (configs["none"].teacher, configs["none"].store) == (None, None)
    assert (configs["clip-rd"].teacher, configs["clip-rd"].store) == ("t", "c/seed-1")


def test_methods_with_other_crops_have_a_store_of_their_own(suite: EvidenceSuite) -> None:
    run = next(run for run in suite.runs() if run.method.name == "clip-rd")
    settings: tuple[dict[str, object], ...] = ({}, {"crop_scale": [0.9, 1.0]}, {"crop_scale": [0.3, 1.0]})
    methods = [replace(run.method, settings=own) for own in settings]
    runs = [dataclasses.replace(run, method=method) for method in methods]
    caches = [run_config(suite, run, teacher="t", stores=Path("c")).store for run in runs]
    assert caches == ["c/seed-0", "c/seed-0", "c/seed-0-crops-0.3-1.0"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("xrd: 0", "xdr: 0"),
        ("- none\n", "- nobody\n"),
        ("- 1\n", "- 0\n"),
        ("name: none", "name: ../none"),
        ("name: small", "name: ours/v2"),
        ("precision: fp32", "precision: auto"),
        ("settings: {}", "settings: {bank_sise: 1}"),
    ],
)
def test_an_invalid_suite_is_an_error(suite: EvidenceSuite, tmp_path: Path, old: str, new: str) -> None:
    text = to_yaml(suite)
    assert old in text
    path = tmp_path / "suite.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as refused:
        read_evidence(str(path))
    assert_form(str(refused.value), refused.value.hint)


def difference_from_none(evidence: Evidence, method: str) -> Difference | None:
    return difference(runs_of(evidence, "test_vit", method), runs_of(evidence, "test_vit", "none"), [0])


def test_differences_use_the_seeds_that_both_methods_have(make: Make) -> None:
    result = difference_from_none(make({("none", 0): 4, ("none", 1): 10, ("clip-rd", 1): 13}), "clip-rd")
    assert result is not None
    assert (result.spread.count, result.spread.mean) == (1, pytest.approx(3 / IMAGES))
    assert difference_from_none(make({("none", 0): 4, ("clip-rd", 1): 13}), "clip-rd") is None


def test_more_seeds_on_the_same_images_do_not_narrow_the_interval(make: Make) -> None:
    one_seed, two_seeds = (
        difference_from_none(
            make({(name, s): n for name, n in (("none", 4), ("clip-rd", 12)) for s in seeds}), "clip-rd"
        )
        for seeds in ((0,), (0, 1))
    )
    assert one_seed is not None
    assert two_seeds is not None
    assert one_seed.interval == two_seeds.interval
    assert (one_seed.spread.deviation, two_seeds.spread.deviation) == (None, 0)


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
