"""The script for Rockchip boards, against a stand-in for its toolkit."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clip_rd_edge.runtime.backends.onnxruntime import open_session

SCRIPT = Path(__file__).parents[2] / "export" / "cpu-arm" / "convert_rknn.py"


class Toolkit:
    """A stand-in for rknn's: its simulator runs the ONNX file in ONNX Runtime."""

    def __init__(self, *, verbose: bool) -> None:
        assert not verbose

    def config(self, *, target_platform: str) -> int:
        assert target_platform == "rk3588"
        return 0

    def load_onnx(self, path: str, *, inputs: list[str], input_size_list: list[list[int]]) -> int:
        self.session, self.name, self.size = open_session(path), inputs[0], input_size_list[0]
        return 0

    def build(self, *, do_quantization: bool) -> int:
        assert not do_quantization
        return 0

    def export_rknn(self, path: str) -> int:
        Path(path).write_bytes(b"rknn")
        return 0

    def init_runtime(self) -> int:
        return 0

    def inference(self, *, inputs: list[Any], data_format: list[str] | None) -> list[Any]:
        (row,) = inputs
        assert list(row.shape) == self.size
        assert data_format == (["nchw"] if row.ndim == 4 else None)
        return list(self.session.run(None, {self.name: row}))

    def release(self) -> None: ...


def run(monkeypatch: pytest.MonkeyPatch, bundle: Path, output: Path) -> int | str | None:
    module = ModuleType("rknn.api")
    module.RKNN = Toolkit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rknn", ModuleType("rknn"))
    monkeypatch.setitem(sys.modules, "rknn.api", module)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(bundle), str(output)])
    with pytest.raises(SystemExit) as ended:
        exec(compile(SCRIPT.read_text(encoding="utf-8"), str(SCRIPT), "exec"), {"__name__": "__main__"})
    return ended.value.code


def test_both_towers_are_converted_and_compared(
    fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, fp32_bundle, tmp_path / "files") == 0
    assert {path.name for path in (tmp_path / "files").iterdir()} == {"image.rknn", "text.rknn"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["image tower", "text tower"]
    assert all(line.endswith("lowest centred cosine 1.000000") for line in lines)
