"""The list of deliberate faults keeps up with the code."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.robustness import mutations as script
from benchmarks.robustness.mutations import ROOT, Mutation, Outcome, apply, check_all, read_mutations, run_tests

MUTATIONS = [(area, mutation) for area, mutations in read_mutations().items() for mutation in mutations]


def _selected(tests: str) -> list[str]:
    """Return the words by which -k selects tests; without it, a word that every file of tests has."""
    words = shlex.split(tests)
    if "-k" not in words:
        return ["def test_"]
    return [word for word in words[words.index("-k") + 1].split() if word not in ("and", "or", "not")]


def test_every_fault_can_be_applied_and_its_tests_are_there() -> None:
    problems = []
    for _, mutation in MUTATIONS:
        count = (ROOT / mutation.file).read_text().count(mutation.old)
        files = [word for word in mutation.tests.split() if word.startswith("tests/")]
        if count != 1 or not files or not all((ROOT / file).exists() for file in files):
            problems.append(f"{mutation.fault}: its text occurs {count} times in {mutation.file}")
        elif not any(word in (ROOT / file).read_text() for file in files for word in _selected(mutation.tests)):
            problems.append(f"{mutation.fault}: no test is selected by {mutation.tests}")
    assert not problems, "update benchmarks/mutations.yaml"


def test_there_are_faults_in_every_package_and_none_twice() -> None:
    packages = {area for area, _ in MUTATIONS}
    assert packages >= {"contract", "data", "runtime", "exporting", "benchmarking", "serving", "web", "cli"}
    assert packages >= {"models", "losses", "utils", "evidence", "trainer"}
    assert [fault for fault, count in Counter(mutation.fault for _, mutation in MUTATIONS).items() if count > 1] == []


def test_a_fault_replaces_its_text_alone(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("if a < b:\n    pass\n")
    mutation = Mutation(fault="compares wrongly", file="module.py", old="a < b", new="a > b", tests="")
    apply(mutation, tmp_path)
    assert (tmp_path / "module.py").read_text() == "if a > b:\n    pass\n"
    with pytest.raises(SystemExit, match="occurs 0 times"):
        apply(mutation, tmp_path)


def test_an_interrupted_run_repeats_only_what_was_not_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def check(mutation: Mutation, copy: Path, passing: dict[str, bool]) -> Outcome:
        if mutation.fault == "interrupted" and len(checked) < 3:
            raise KeyboardInterrupt
        checked.append(mutation.fault)
        return Outcome(True, mutation.fault != "unnoticed", 1.0)

    monkeypatch.setattr(script, "check", check)
    monkeypatch.setattr(script, "COPIED", ())
    faults = [
        Mutation(fault=name, file=name, old="", new="", tests="") for name in ("noticed", "unnoticed", "interrupted")
    ]
    with pytest.raises(KeyboardInterrupt):
        check_all(faults, tmp_path / "verdicts.json")
    checked.append("again")
    outcomes = check_all(faults, tmp_path / "verdicts.json")
    assert checked == ["noticed", "unnoticed", "again", "unnoticed", "interrupted"]
    assert [outcomes[fault.key].verdict for fault in faults] == ["noticed", "**unnoticed**", "noticed"]


def test_tests_that_do_not_end_count_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_loop.py").write_text("def test_loop():\n    while True:\n        pass\n")
    monkeypatch.setattr(script, "TIMEOUT_S", 3.0)
    assert not run_tests(tmp_path, "test_loop.py -c /dev/null")
