from __future__ import annotations

import ast
import importlib
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import clip_rd_edge
from clip_rd_edge.utils.paths import Typed, cache_home, file_identity


@pytest.fixture(autouse=True)
def _without_override(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLIP_RD_EDGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_without_a_home_the_cache_is_where_containers_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_home() == Path(os.sep) / ".cache" / "clip-rd-edge"


def test_files_of_the_same_size_and_time_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (1, 1))  # as in images of OSTree and Nix
    assert file_identity(tmp_path / "a") == file_identity(tmp_path / "a") != file_identity(tmp_path / "b")
    assert file_identity(tmp_path / "c") is None


PACKAGE = Path(clip_rd_edge.__file__).parent
READERS = ("read_json", "read_yaml", "read_versioned_json")


def _structs_that_are_read() -> Iterator[type[msgspec.Struct]]:
    """The structs that the package's modules hand to READERS by name."""
    for path in PACKAGE.rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        for call in calls:
            if isinstance(call.func, ast.Name) and call.func.id in READERS and isinstance(call.args[1], ast.Name):
                module = ".".join(("clip_rd_edge", *path.relative_to(PACKAGE).with_suffix("").parts))
                struct = getattr(importlib.import_module(module), call.args[1].id, None)
                if isinstance(struct, type):
                    yield struct


def _mentioned(annotation: Any) -> Iterator[Any]:
    """The types in an annotation, and in the structs among them."""
    yield annotation
    inner = typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        inner = tuple(msgspec.structs.fields(annotation))
    for part in inner:
        yield from _mentioned(part.type if isinstance(part, msgspec.structs.FieldInfo) else part)


def test_nothing_that_a_file_holds_is_taken_for_typed() -> None:
    structs = set(_structs_that_are_read())
    assert {"Suite", "RecordedConfig", "Recipe", "Manifest"} <= {struct.__name__ for struct in structs}
    assert [struct.__name__ for struct in structs if Typed in _mentioned(struct)] == []


RIGHT = """
load_pairs(Typed("pairs.csv"))
load_clip(typed(Path("runs/first")))
"""
WRONG = """
load_pairs(suite.tasks[0])
load_task(suite.tasks[0])
load_clip(suite.rows[0].model)
load_clip(str(config.student))
parse_sources("a.tar")
TrainingData(data=config.data)
Path(config.student)
RemoteShard("pipe:id")
"""
PROGRAM = """from pathlib import Path
from clip_rd_edge.benchmarking.suite import Suite
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.remote import RemoteShard
from clip_rd_edge.data.webdataset import parse_sources
from clip_rd_edge.data.tasks import load_task
from clip_rd_edge.data.load import TrainingData
from clip_rd_edge.distillation.config import RecordedConfig
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.utils.paths import Typed, typed
def program(suite: Suite, config: RecordedConfig) -> None:
"""


@pytest.mark.slow
def test_the_type_checker_refuses_to_open_what_a_file_records(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    program, root = tmp_path / "program.py", PACKAGE.parent
    options = ("--config-file", str(root / "pyproject.toml"), "--cache-dir", str(root / ".mypy_cache"))
    for lines, is_right in ((RIGHT.split("\n")[1:-1], True), (WRONG.split("\n")[1:-1], False)):
        program.write_text(PROGRAM + "".join(f"    {line}\n" for line in lines))
        out, err, _ = api.run([str(program), *options])
        found = {line.split(":")[1] for line in out.splitlines() if ": error:" in line}
        assert len(found) == (0 if is_right else len(lines)), out + err
