"""Uploads to a stand-in of the Hugging Face hub on the loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any

import pytest

from clip_rd_edge.errors import InputError
from clip_rd_edge.models.push import push_folder

TOKEN = "hf_stand_in"
_LARGE = 1000  # bytes, from which on the stand-in wants a file in its large file storage


class Hub(ThreadingHTTPServer):
    """A repository behind the hub's HTTP interface: created, asked about files, given large ones, and committed to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.created = list[dict[str, Any]]()
        self.stored = dict[str, bytes]()  # large files by SHA-256
        self.files = dict[str, bytes]()  # committed files by path
        self.messages = list[str]()
        self.branches = ["main"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, status: int, content: Any, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        branch = self.path.partition("/revision/")[2]
        if branch and branch not in self.server.branches:
            self._answer(404, {"error": f"Invalid rev id: {branch}"}, {"X-Error-Code": "RevisionNotFound"})
            return
        self._answer(200, {"name": "me"} if "whoami" in self.path else {"id": "me/my-clip", "sha": "0" * 40})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.stored[hashlib.sha256(body).hexdigest()] = body
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/verify" not in self.path:
            self._answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer(200, {"url": f"{self.server.url}/me/my-clip"})
        elif self.path == "/api/validate-yaml":  # the header of the model card
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= _LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self._answer(200, {"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/store/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif "/branch/" in self.path:
            self.server.branches.append(self.path.rpartition("/")[2])
            self._answer(201, {})
        elif "/commit/" in self.path and self.path.rpartition("/")[2] not in self.server.branches:
            self._answer(400, {"error": "The branch is protected."})
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
            self._answer(200, {"commitUrl": f"{self.server.url}/me/my-clip/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._answer(404, {"error": self.path})

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.stored[value["oid"]]


@contextmanager
def _serving(hub: Hub) -> Iterator[Hub]:
    thread = Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with _serving(Hub()) as server:
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a small and a large file, one of them in a folder."""
    folder = tmp_path / "model"
    (folder / "onnx").mkdir(parents=True)
    (folder / "open_clip_config.json").write_text('{"model_cfg": {}}')
    (folder / "README.md").write_text("# Model\n")
    (folder / "onnx" / "model.onnx").write_bytes(bytes(range(256)) * 20)
    return folder


def push(
    folder: Path, endpoint: str, home: Path, *options: str, token: str = TOKEN, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: the hub's client reads its address when it is imported."""
    environment = {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
                   "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}  # fmt: skip
    command = [sys.executable, "-m", "clip_rd_edge", "push", str(folder), "me/my-clip", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False, cwd=cwd)


def test_every_file_of_the_folder_arrives_in_one_commit(hub: Hub, model: Path, tmp_path: Path) -> None:
    result = push(model, hub.url, tmp_path, "--private", "--message", "First")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{hub.url}/me/my-clip"
    local = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert hub.files == local
    assert len(hub.stored) == 1
    assert hub.messages == ["First"]
    assert hub.created[0]["name"] == "my-clip"
    assert True in (hub.created[0].get("private"), hub.created[0].get("visibility") == "private")


def test_the_folder_of_a_run_uploads_its_student_alone(hub: Hub, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step.pt").write_text("state")
    model.rename(run / "student")
    assert push(run, hub.url, tmp_path).returncode == 0
    assert sorted(hub.files) == ["README.md", "onnx/model.onnx", "open_clip_config.json"]


def test_a_text_tower_of_hugging_face_is_found_in_the_repository(hub: Hub, model: Path, tmp_path: Path) -> None:
    names = {"hf_model_name": str(model), "hf_tokenizer_name": "all-MiniLM-L6-v2", "context_length": 16}
    (model / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 4, "text_cfg": names}}))
    (model / "config.json").write_text('{"model_type": "bert"}')
    (model / "tokenizer.json").write_text("{}")
    result = push(Path(), hub.url, tmp_path, cwd=model)  # as anybody does who stands in the folder
    assert result.returncode == 0, result.stderr
    assert hub.messages == [f"Upload {model.name} with clip-rd-edge"]
    text_cfg = json.loads(hub.files["open_clip_config.json"])["model_cfg"]["text_cfg"]
    assert text_cfg == {"hf_model_name": "me/my-clip", "hf_tokenizer_name": "me/my-clip", "context_length": 16}
    assert {"README.md", "onnx/model.onnx", "config.json", "tokenizer.json"} < hub.files.keys()
    assert str(model) in (model / "open_clip_config.json").read_text()


def test_a_secret_that_an_earlier_version_recorded_is_not_uploaded(hub: Hub, model: Path, tmp_path: Path) -> None:
    record = {
        "data": "https://a.example/0.tar?sig=SECRET",
        "configuration": {"data": "https://me:SECRET@a.example/0.tar"},
    }
    (model / "distillation.json").write_text(json.dumps(record))
    result = push(model, hub.url, tmp_path)
    assert result.returncode == 0, result.stderr
    address = "https://a.example/0.tar"
    assert json.loads(hub.files["distillation.json"]) == {"data": address, "configuration": {"data": address}}
    assert {"README.md", "onnx/model.onnx", "open_clip_config.json"} < hub.files.keys()
    assert json.loads((model / "distillation.json").read_text()) == record


def test_a_branch_that_does_not_exist_is_created(hub: Hub, model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        result = push(model, hub.url, tmp_path, "--revision", "int8")
        assert result.returncode == 0, result.stderr
    assert hub.branches == ["main", "int8"]
    assert len(hub.messages) == 2


def test_the_reason_of_the_hub_is_named(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.branches.clear()
    result = push(model, hub.url, tmp_path)
    assert result.returncode == 1
    assert result.stderr.endswith("error: The hub refused the upload to me/my-clip: The branch is protected.\n")


def test_a_token_that_may_not_write_is_told_so(hub: Hub, model: Path, tmp_path: Path) -> None:
    result = push(model, hub.url, tmp_path, token="hf_other")
    assert result.returncode == 2
    assert "does not let you write to me/my-clip (status 401)" in result.stderr
    assert "hf auth login" in result.stderr
    assert TOKEN not in result.stderr
    assert hub.files == {}


def test_a_hub_that_does_not_answer_is_named(model: Path, tmp_path: Path) -> None:
    with _serving(Hub()) as hub:
        url = hub.url
    result = push(model, url, tmp_path)
    assert result.returncode == 1
    assert f"The hub at {url} could not be reached" in result.stderr


def test_a_folder_without_a_model_is_never_uploaded(tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    with pytest.raises(InputError, match="holds no model"):
        push_folder(tmp_path, "me/my-clip")
