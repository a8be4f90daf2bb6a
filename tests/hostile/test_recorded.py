"""What a stranger's file records is neither run nor fetched: commands, URLs and paths in everything that is read."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from clip_rd_edge.models.load import save_clip
from clip_rd_edge.models.student import build_student, student_config

CommandLine = Callable[..., tuple[int, str, str]]


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


def _record(run: Path, **record: Any) -> None:
    (run / "student" / "distillation.json").write_text(json.dumps(record))


@pytest.mark.parametrize("options", [("--precision", "int8"), ("--target", "cpu-x86")])
@pytest.mark.parametrize("place", ["data", "images", "texts", "url", "config.yaml"])
def test_an_export_opens_no_data_that_a_record_names(
    theirs: Path, bait: Bait, tmp_path: Path, command_line: CommandLine, place: str, options: tuple[str, str]
) -> None:
    if place == "config.yaml":
        (theirs / place).write_text(f"data: '{bait.command}'")
        _record(theirs, data="pipe:…", configuration={"data": "pipe:…"})
    elif place in ("data", "url"):
        _record(theirs, data=bait.command if place == "data" else bait.url)
    else:
        _record(theirs, data=None, configuration={"images": str(tmp_path), "texts": "labels.txt", place: bait.command})
    for model in (theirs, f"local-dir:{theirs / 'student'}"):
        code, _, err = command_line("export", model, *options, "-o", tmp_path / "bundle")
        assert (code, "--calibration" in err, bait.taken) == (2, True, False)
