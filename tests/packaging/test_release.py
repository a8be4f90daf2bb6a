"""A release: versions that agree, archives that are complete, files for containers and conda that fit the clone."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clip_rd_edge import __version__

pytest.importorskip("packaging")
licences, release = importlib.import_module("licences"), importlib.import_module("release")

ROOT = Path(__file__).parents[2]
CONTAINERFILES = sorted((ROOT / "packaging").glob("*.Containerfile"))


def test_this_clone_has_one_version() -> None:
    assert release.version_of(ROOT) == __version__
    recipe = (ROOT / "packaging" / "conda" / "meta.yaml").read_text()
    assert f'{{% set version = "{__version__}" %}}' in recipe


def test_what_a_release_must_hold_is_in_this_clone() -> None:
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


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.stem)
def test_a_container_file_installs_extras_that_exist(path: Path) -> None:
    (extras,) = re.findall(r"'\.\[([\w,-]+)\]'", path.read_text(encoding="utf-8"))
    assert set(extras.split(",")) <= licences.requirements().keys()


def test_the_conda_recipe_has_the_packages_own_dependencies() -> None:
    recipe = (ROOT / "packaging" / "conda" / "meta.yaml").read_text(encoding="utf-8")
    listed = re.search(r"^  run:\n((?:    - .+\n)+)", recipe, re.M)
    assert listed
    of_conda = {licences.Requirement(line.strip("- ").lower()) for line in listed[1].splitlines()}
    required = {licences.Requirement(str(line).lower()) for line in licences.requirements()["-"]}
    assert of_conda == {licences.Requirement("python>=3.10"), *required}


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("make"), reason="of make on Linux")
@pytest.mark.parametrize("has_gpu", [False, True])
def test_torch_is_its_build_for_cpus_where_there_is_no_nvidia_gpu(has_gpu: bool, tmp_path: Path) -> None:
    for name in ("make", "uname", "sh", "python3"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    if has_gpu:
        (tmp_path / "nvidia-smi").symlink_to("/bin/true")
    command = ["make", "-n", "VENV=new", "new/.installed"]
    environment = {**os.environ, "PATH": str(tmp_path)}
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert ("whl/cpu torch" in shown) is not has_gpu
