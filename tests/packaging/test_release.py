"""A release: versions that agree, archives that are complete, and files for containers and conda that fit the clone."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from clip_rd_edge import __version__

ROOT = Path(__file__).parents[2]
CONTAINERFILES = sorted((ROOT / "packaging").glob("*.Containerfile"))


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / "packaging" / "release.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_this_clone_has_one_version(release: ModuleType) -> None:
    assert release.version_of(ROOT) == __version__
    recipe = (ROOT / "packaging" / "conda" / "meta.yaml").read_text()
    assert f'{{% set version = "{__version__}" %}}' in recipe


def test_what_a_release_must_hold_is_in_this_clone(release: ModuleType) -> None:
    for name in (*release.IN_SDIST, *release.IN_WHEEL):
        assert (ROOT / name.replace("clip_rd_edge/_shipped/", "")).is_file(), name


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.stem)
def test_a_container_file_copies_what_there_is_and_what_the_builder_gets(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M) for name in line.split()[:-1]]
    sent = re.findall(r"^!(.+)$", (ROOT / ".containerignore").read_text(), re.M)
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert name in sent


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.stem)
def test_a_container_file_installs_extras_that_exist(path: Path) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"'\.\[([\w,-]+)\]'", path.read_text(encoding="utf-8"))
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_the_conda_recipe_has_the_packages_own_dependencies() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    recipe = (ROOT / "packaging" / "conda" / "meta.yaml").read_text(encoding="utf-8")
    listed = re.search(r"^  run:\n((?:    - .+\n)+)", recipe, re.M)
    assert listed
    of_conda = {line.strip("- ").replace(" ", "").lower() for line in listed[1].splitlines()}
    expected = {f"python{project['requires-python']}", *(name.lower() for name in project["dependencies"])}
    assert of_conda == expected
