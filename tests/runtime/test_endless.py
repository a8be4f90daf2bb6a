"""A model that never ends, from a bundle that somebody made, ends with a signal or its time."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from support import PATIENCE_S, CommandLine, rewrite, wait_until

from clip_rd_edge.runtime.backends.onnxruntime import Session
from clip_rd_edge.utils.process import handled_by

# Says when ONNX Runtime is called; stops a server after a second.
SCRIPT = """
import sys
import onnxruntime as ort
from clip_rd_edge.cli.main import main
plain = ort.InferenceSession.run

def run(session, *arguments):
    print("running", file=sys.stderr, flush=True)
    return plain(session, *arguments)

ort.InferenceSession.run = run
if sys.argv[1] in ("serve", "demo"):
    import uvicorn
    config = uvicorn.Config
    uvicorn.Config = lambda app, **options: config(app, **{**options, "timeout_graceful_shutdown": 1})
main()
"""


@pytest.fixture
def endless(colour_bundle: Path) -> Path:
    """A bundle whose image tower never ends for an image with a pixel above 0."""
    path = colour_bundle / "image.onnx"
    model = onnx.load(path)
    condition = helper.make_tensor_value_info("again", TensorProto.BOOL, [])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in ("before", "after")]
    count = helper.make_tensor_value_info("count", TensorProto.INT64, [])
    same = [helper.make_node("Identity", ["again"], ["on"]), helper.make_node("Identity", ["before"], ["after"])]
    on = helper.make_tensor_value_info("on", TensorProto.BOOL, [])
    body = helper.make_graph(same, "body", [count, condition, values[0]], [on, values[1]])
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Mul", ["largest", "many"], ["times"]),
        helper.make_node("Cast", ["times"], ["rounds"], to=TensorProto.INT64),
        helper.make_node("Loop", ["rounds", "true", "zero"], ["end"], body=body),
        helper.make_node("Add", ["x", "end"], ["same x"]),
    ]
    model.graph.node[0].input[0] = "same x"
    for number, node in enumerate(nodes):
        model.graph.node.insert(number, node)
    constants = {"many": np.float32(1e15), "true": np.bool_(True), "zero": np.float32(0)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items())
    onnx.save(model, path)
    rewrite(colour_bundle)
    return colour_bundle


@contextmanager
def started(arguments: Sequence[object]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_running(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    assert any("running" in line for line in process.stderr)
    time.sleep(0.3)


@pytest.mark.parametrize(
    ("command", "count", "number", "code"),
    [("classify", 60, signal.SIGTERM, -signal.SIGTERM), ("index", 3, signal.SIGINT, 75)],
)
def test_a_signal_ends_a_command_whose_model_never_ends(
    command: str, count: int, number: signal.Signals, code: int, endless: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (8, 8), (255, i, 0)).save(folder / f"{i}.png")
    arguments: Mapping[str, list[object]] = {
        "classify": [folder, "--labels", "red", "green", "--no-cache"],
        "index": [folder, "-o", tmp_path / "index"],
    }
    with started([command, endless, *arguments[command], "--threads", "1"]) as process:
        if command == "classify":  # the labels come first
            wait_until_running(process)
        wait_until_running(process)
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == code


@pytest.mark.parametrize(
    ("command", "number", "code"), [("serve", signal.SIGTERM, -signal.SIGTERM), ("demo", signal.SIGINT, 130)]
)
def test_a_server_stops_although_a_model_never_ends(
    command: str, number: signal.Signals, code: int, endless: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    content = (tmp_path / "red.png").read_bytes()
    with started([command, endless, "--port", "0"]) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()

        def post(path: str, body: bytes) -> Any:
            return json.load(urllib.request.urlopen(urllib.request.Request(url + path, body)))

        def ask() -> None:
            with suppress(OSError):
                if command == "serve":
                    image = base64.b64encode(content).decode()
                    post("classify", json.dumps({"image": image, "labels": ["red", "blue"]}).encode())
                else:
                    key = post("api/labels", b'["red"]')["key"]
                    post(f"api/classify?labels={key}", content)

        client = threading.Thread(target=ask)
        client.start()
        assert process.stderr is not None
        for line in process.stderr:  # not the one of the start
            if "Ctrl-C" in line:
                break
        for _ in range(2):  # the labels come first
            wait_until_running(process)
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == code
        client.join()


def test_verify_ends_a_tower_after_a_time(endless: Path, command_line: CommandLine) -> None:
    started = time.monotonic()
    code, out, err = command_line("verify", endless, "--json", "--time-limit", "1")
    assert code == 1
    assert time.monotonic() - started < PATIENCE_S
    failed = [check for check in json.loads(out) if not check["passed"]]
    assert [check["what"] for check in failed] == ["image tower", "text tower"]  # which had no time left
    assert "hint: allow more with --time-limit" in err


def test_a_command_is_left_if_native_code_does_not_end(colour_bundle: Path) -> None:
    script = SCRIPT.replace("main()\n", "")
    stuck = f"""{script}
import ctypes
from clip_rd_edge.utils import process as signals
signals._PATIENCE_S = 0.3
ort.InferenceSession.run = lambda *_: ctypes.CDLL(None).sleep(1_000)
main()
"""
    process = subprocess.run(
        [sys.executable, "-c", stuck, "verify", colour_bundle, "--time-limit", "0.3"], capture_output=True, text=True
    )
    assert process.returncode == 1
    assert "error: " in process.stderr


class Ending:
    """Stands in for a session; the first run ends when it is asked to."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, names: object, feed: object, options: Any) -> list[int]:
        self.runs += 1
        if self.runs == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            assert wait_until(lambda: options.terminate)
            raise RuntimeError("Exiting due to terminate flag")
        return [self.runs]


def test_a_signal_that_the_program_survives_costs_no_answer() -> None:
    received = list[int]()
    with handled_by(lambda number, _: received.append(number), [signal.SIGTERM]):
        outputs: Any = Session(Ending()).run(None, {})
    assert (outputs, received) == ([2], [signal.SIGTERM])
