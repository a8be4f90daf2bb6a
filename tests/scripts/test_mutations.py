"""The list of deliberate faults keeps up with the code."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from mutations import ROOT, Mutation, apply, read_mutations

MUTATIONS = [(area, mutation) for area, mutations in read_mutations().items() for mutation in mutations]


def test_every_fault_can_be_applied_and_its_tests_are_there() -> None:
    problems = []
    for _, mutation in MUTATIONS:
        count = (ROOT / mutation.file).read_text().count(mutation.old)
        files = [word for word in mutation.tests.split() if word.startswith("tests/")]
        if count != 1 or not files or not all((ROOT / file).exists() for file in files):
            problems.append(f"{mutation.fault}: its text occurs {count} times in {mutation.file}")
    assert not problems, "update benchmarks/mutations.yaml"


def test_there_are_faults_in_every_package_and_none_twice() -> None:
    packages = {area for area, _ in MUTATIONS}
    assert packages >= {"contract", "data", "runtime", "convert", "exporters", "benchmarking", "serving", "web", "cli"}
    assert packages >= {"models", "losses", "utils", "evidence", "trainer"}
    assert [fault for fault, count in Counter(mutation.fault for _, mutation in MUTATIONS).items() if count > 1] == []


def test_a_fault_replaces_its_text_alone(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("if a < b:\n    pass\n")
    mutation = Mutation(fault="compares wrongly", file="module.py", old="a < b", new="a > b", tests="")
    apply(mutation, tmp_path)
    assert (tmp_path / "module.py").read_text() == "if a > b:\n    pass\n"
    with pytest.raises(SystemExit, match="occurs 0 times"):
        apply(mutation, tmp_path)
