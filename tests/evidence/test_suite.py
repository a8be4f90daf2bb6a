from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from msgspec.structs import replace
from support import assert_form

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.evidence.run import run_config
from clip_rd_edge.evidence.suite import EvidenceSuite, read_evidence
from clip_rd_edge.utils.files import write_text
from clip_rd_edge.utils.structs import to_yaml


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
