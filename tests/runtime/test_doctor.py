from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_rd_edge.errors import install_command
from clip_rd_edge.runtime import doctor

Run = Callable[..., tuple[int, str, str]]


def test_a_missing_extra_is_reported_with_its_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "is_installed", lambda package: package != "torch")
    train = next(finding for finding in doctor.examine() if finding.what == "[train]")
    assert train.state == "missing"
    assert train.detail.endswith("needs torch")
    assert train.remedy == install_command("train")


@pytest.mark.parametrize(
    ("release", "device", "remedy"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic", "jetson-orin", "pip install 'cuda-bindings<13'"),
        ("# R38 (release), REVISION: 2.0, GCID: 1, BOARD: generic", "jetson-thor", "pip install 'cuda-bindings>=13'"),
    ],
)
def test_a_jetson_gets_the_cuda_bindings_of_its_cuda(
    release: str, device: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "release").write_text(release)
    monkeypatch.setattr("clip_rd_edge.utils.host._JETSON_RELEASE", tmp_path / "release")
    wrong, right = ("13.5.0", "12.9.10") if "<13" in remedy else ("12.9.10", "13.5.0")
    monkeypatch.setattr(doctor, "is_installed", lambda package: True)
    monkeypatch.setattr(doctor, "version", lambda package: wrong)
    assert doctor._gpu().detail.endswith(f"clip-rd-edge targets {device}")
    assert doctor._gpu().remedy.startswith(remedy)
    monkeypatch.setattr(doctor, "version", lambda package: right)
    assert doctor._gpu().remedy == ""
    monkeypatch.setattr(doctor, "is_installed", lambda package: False)
    assert doctor._gpu().remedy.startswith(remedy)


def test_wrong_sums_of_int8_are_reported_with_the_versions_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_rd_edge.runtime.backends.onnxruntime.wrong_sums", lambda: "wrong sums here")
    finding = doctor._onnxruntime()
    assert "wrong sums here" in finding.detail
    assert "!=" in finding.remedy


def test_the_doctor_command(command_line: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output, error = command_line("doctor", "--extras")
    assert (code, error, "[emoji]" in output) == (0, "", True)
    code, output, _ = command_line("doctor", "--json")
    assert {"machine", "processor", "threads", "ONNX Runtime", "GPU"} <= {
        finding["what"] for finding in json.loads(output)
    }
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, output, _ = command_line("doctor", "--json")
    assert code == 1
    assert "broken" in {finding["state"] for finding in json.loads(output)}
