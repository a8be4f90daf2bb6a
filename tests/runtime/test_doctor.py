from __future__ import annotations

import json
import sys

import pytest
from support import CommandLine


def test_the_doctor_command(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output, error = command_line("doctor", "--extras")
    assert (code, error, "[emoji]" in output) == (0, "", True)
    code, output, _ = command_line("doctor", "--json")
    assert {"machine", "processor", "threads", "ONNX Runtime", "GPU"} <= {
        finding["what"] for finding in json.loads(output)
    }
    monkeypatch.setattr("clip_rd_edge.runtime.backends.onnxruntime.wrong_sums", lambda: "wrong sums here")
    assert "wrong sums here" in command_line("doctor")[1].replace("\n", " ")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, output, _ = command_line("doctor", "--json")
    assert code == 1
    assert "broken" in {finding["state"] for finding in json.loads(output)}
