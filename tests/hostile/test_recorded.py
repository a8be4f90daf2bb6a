"""What a stranger's file records is neither run nor fetched: commands, URLs and paths in everything that is read."""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml
from support import CommandLine

import clip_rd_edge as edge
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.models.students import build_student, student_config
from clip_rd_edge.runtime.index import read_index, write_index


@dataclass
class Bait:
    """A command that leaves a file and an address that is watched; `taken` is whether one of them was used."""

    flag: Path
    url: str
    requests: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        return f"pipe:touch {self.flag}; exit 1"

    @property
    def taken(self) -> bool:
        return self.flag.exists() or bool(self.requests)


@pytest.fixture
def bait(tmp_path: Path) -> Iterator[Bait]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            bait.requests.append(self.path)
            self.send_error(404)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        bait = Bait(tmp_path / "flag", f"http://127.0.0.1:{server.server_port}/a.tar")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield bait
        server.shutdown()


@pytest.fixture(scope="module")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = student_config("resnet10t", embedding_size=16, image_size=32, text="tiny", context_length=8)
    save_clip(folder, build_student(config, name="tiny"), provenance={})
    return folder


@pytest.fixture
def theirs(_model: Path, tmp_path: Path) -> Path:
    """The folder of a stranger's run, with a tiny random student."""
    return Path(shutil.copytree(_model, tmp_path / "theirs" / "student")).parent


@pytest.fixture
def looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whatever of `tmp_path / "bait"` is looked for, opened or listed."""
    bait, touched = str(tmp_path / "bait"), list[str]()

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(bait):
                touched.append(os.fspath(path))
            return function(path, *args, **options)

        return call

    for module, name in (
        (os, "stat"), (os, "lstat"), (os, "readlink"), (os, "scandir"), (os, "listdir"), (os, "open"), (io, "open"),
        (builtins, "open"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return touched


def _record(run: Path, **record: Any) -> None:
    (run / "student" / "distillation.json").write_text(json.dumps(record))


@pytest.mark.parametrize("place", ["data", "images", "texts", "url", "config.yaml"])
def test_an_export_opens_no_data_that_a_record_names(
    theirs: Path, bait: Bait, tmp_path: Path, command_line: CommandLine, place: str
) -> None:
    if place == "config.yaml":
        (theirs / place).write_text(f"data: '{bait.command}'")
        _record(theirs, data="pipe:…", configuration={"data": "pipe:…"})
    elif place in ("data", "url"):
        _record(theirs, data=bait.command if place == "data" else bait.url)
    else:
        _record(theirs, data=None, configuration={"images": str(tmp_path), "texts": "labels.txt", place: bait.command})
    for model, *options in (
        (theirs, "--precision", "int8"),
        (f"local-dir:{theirs / 'student'}", "--target", "cpu-x86"),
    ):
        code, _, err = command_line("export", model, *options, "-o", tmp_path / "bundle")
        assert (code, "--calibration" in err, bait.taken) == (2, True, False)


@pytest.mark.parametrize("place", ["command", "url"])
@pytest.mark.parametrize("field", ["data", "tasks"])
def test_a_suite_runs_and_fetches_nothing(
    theirs: Path, bait: Bait, tmp_path: Path, command_line: CommandLine, field: str, place: str
) -> None:
    text = bait.command if place == "command" else f"emoji.tar:: {bait.url}"
    suite, output = tmp_path / "suite.yaml", tmp_path / "out"
    content = yaml.safe_load((Path(__file__).parents[2] / "benchmarks/suites/tokens.yaml").read_text())
    suite.write_text(yaml.safe_dump({**content, field: text if field == "data" else [text]}))
    code, _, err = command_line("evidence", "run", suite, "--teacher", theirs, "-o", output)
    assert (code, "The suite tokens names" in err, bait.taken) == (2, True, False)
    if field == "tasks":
        rows = [{"label": "Theirs", "model": str(theirs), "role": "student"}]
        suite.write_text(yaml.safe_dump({"name": "theirs", "rows": rows, "tasks": [text]}))
        code, _, err = command_line("benchmark", suite, "-o", output)
        assert (code, "The suite theirs names" in err, bait.taken) == (2, True, False)


@pytest.mark.parametrize("with_inputs", [True, False])
def test_a_resumed_run_looks_for_nothing_that_its_folder_names(
    bait: Bait, tmp_path: Path, pairs_csv: Path, command_line: CommandLine, looked_for: list[str], with_inputs: bool
) -> None:
    run = tmp_path / "run"
    call = (
        "distill", "--data", pairs_csv, "--student", "resnet10t", "--text", "64x1", "--image-size", "32",
        "--context-length", "8", "--embedding-size", "16", "--recipe", "clip", "--batch-size", "4", "--steps", "2",
        "--workers", "0", "-o", run,
    )  # fmt: skip
    assert command_line(*call)[0] == 0
    content = yaml.safe_load((run / "config.yaml").read_text())
    if not with_inputs:
        (run / "inputs.json").unlink()
    for name in ("data", "images", "texts", "teacher", "student", "text", "pretrained_image", "store"):
        for place in (bait.command, bait.url, str(tmp_path / "bait" / "there"), f"local-dir:{tmp_path / 'bait'}"):
            (run / "config.yaml").write_text(yaml.safe_dump({**content, name: place}))
            code, _, err = command_line(*call, "--resume")
            assert (code in (0, 2), bait.taken, looked_for) == (True, False, []), (name, place, err)
    (run / "config.yaml").write_text(yaml.safe_dump({**content, "tasks": [bait.command], "teacher": [bait.command]}))
    code, _, err = command_line(*call, "--resume")
    assert (code in (0, 2), bait.taken, looked_for) == (True, False, []), err


def test_a_search_opens_no_bundle_that_an_index_records(
    colour_bundle: Path, colour_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # which bundle an index was made with is kept there
    index, foreign = tmp_path / "index", tmp_path / "foreign"
    edge.index(colour_bundle, colour_images, index)
    assert edge.search(index, "red", top=1)[0].path.name == "red.png"
    index.rename(foreign)  # as if it came from another machine
    with pytest.raises(edge.InputError) as refused:
        edge.search(foreign, "red")
    assert refused.value.option == "bundle"
    assert edge.search(foreign, "red", top=1, bundle=colour_bundle)[0].path.name == "red.png"
    assert edge.search(foreign, "red", top=1)[0].path.name == "red.png"  # named once


@pytest.mark.parametrize("name", ["../red.png", "/etc/passwd", "a/../../red.png", ""])
def test_an_index_names_no_image_outside_its_folder(
    colour_bundle: Path, colour_images: Path, tmp_path: Path, name: str
) -> None:
    index = tmp_path / "index"
    edge.index(colour_bundle, colour_images, index)
    content, rows = read_index(index)
    write_index(index, msgspec.structs.replace(content, entries=[
        msgspec.structs.replace(entry, path=name if number == 0 else entry.path)
        for number, entry in enumerate(content.entries)
    ]), np.array(rows))  # fmt: skip
    with pytest.raises(edge.ConfigError):
        edge.search(index, "red", bundle=colour_bundle)
