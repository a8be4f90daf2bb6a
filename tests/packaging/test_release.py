"""A release: versions that agree, archives that are complete, and files for containers and conda that fit the clone."""

from __future__ import annotations

import importlib.util
import io
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

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


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """As much of a clone as has a version."""
    (tmp_path / "clip_rd_edge").mkdir()
    (tmp_path / "clip_rd_edge" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3\nText.\n\n## 1.2.2\n")
    return tmp_path


def test_this_clone_has_one_version(release: ModuleType) -> None:
    assert release.version_of(ROOT) == __version__
    recipe = (ROOT / "packaging" / "conda" / "meta.yaml").read_text()
    assert f'{{% set version = "{__version__}" %}}' in recipe


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("CITATION.cff", "version: 1.2.2\n", "CITATION.cff has version 1.2.2, and the package 1.2.3"),
        ("CHANGELOG.md", "## 1.2.2\n", "CHANGELOG.md begins with 1.2.2, and the package is 1.2.3"),
    ],
)
def test_versions_that_differ_are_refused(release: ModuleType, clone: Path, name: str, text: str, message: str) -> None:
    assert release.version_of(clone) == "1.2.3"
    (clone / name).write_text(text)
    with pytest.raises(release.ReleaseError, match=message):
        release.version_of(clone)


def test_an_unreleased_changelog_is_fit_for_a_trial_alone(release: ModuleType, clone: Path) -> None:
    (clone / "CHANGELOG.md").write_text("## Unreleased\n")
    assert release.version_of(clone) == "1.2.3"
    with pytest.raises(release.ReleaseError, match="still begins with Unreleased"):
        release.check_final(clone, "1.2.3", "v1.2.3")


def publishing() -> list[dict[str, Any]]:
    """The steps of the workflow that publishes."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8"))
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_pypi_is_given_the_archives_alone(release: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    built = archives(release, tmp_path / "dist")
    release.write_checksums(built)
    (tmp_path / "dist" / "clip-rd-edge.cdx.json").touch()
    (upload,) = (step for step in publishing() if step.get("uses", "").startswith("actions/upload-artifact"))
    assert set(tmp_path.glob(upload["with"]["path"])) == set(built)


def archives(release: ModuleType, folder: Path, *, without: str = "", extra: str = "") -> tuple[Path, Path]:
    """Both archives with empty files, but for one that is left out or added."""
    stem = "clip_rd_edge-1.2.3"
    sdist, wheel = folder / f"{stem}.tar.gz", folder / f"{stem}-py3-none-any.whl"
    with tarfile.open(sdist, "w:gz") as archive:
        for name in set(release.IN_SDIST) - {without}:
            archive.addfile(tarfile.TarInfo(f"{stem}/{name}"), io.BytesIO())
    with zipfile.ZipFile(wheel, "w") as packed:
        licences = {f"{stem}.dist-info/licenses/{name}" for name in ("LICENSE", "NOTICE")}
        for name in ({*release.IN_WHEEL} | licences | {extra}) - {without, ""}:
            packed.writestr(name, "")
    return sdist, wheel


def test_complete_archives_are_accepted(release: ModuleType, tmp_path: Path) -> None:
    release.check_contents(*archives(release, tmp_path), "1.2.3")
    with pytest.raises(release.ReleaseError, match=r"are not archives of version 1\.2\.4"):
        release.check_contents(*archives(release, tmp_path), "1.2.4")


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
