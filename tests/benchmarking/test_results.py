from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import pytest

from clip_rd_edge.benchmarking.report import write_report
from clip_rd_edge.benchmarking.results import Results, SkippedRow, read_results, this_environment
from clip_rd_edge.exporting.bundle import package_versions


def test_the_environment_describes_this_machine() -> None:
    environment = this_environment()
    assert "core" in environment.machine
    assert environment.packages.keys() >= {"clip-rd-edge", "numpy", "onnxruntime"}
    assert environment.date.endswith("+00:00")


def test_the_installed_distribution_of_onnx_runtime_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_the_gpu_build(package: str) -> str:
        if package == "onnxruntime":
            raise PackageNotFoundError(package)
        return "1.23.0" if package == "onnxruntime-gpu" else version(package)

    monkeypatch.setattr("importlib.metadata.version", with_the_gpu_build)
    for versions in (this_environment().packages, package_versions()):
        assert {name: number for name, number in versions.items() if "onnxruntime" in name} == {
            "onnxruntime-gpu": "1.23.0"
        }


def test_reading_package_versions_imports_neither_torch_nor_onnxruntime() -> None:
    program = (
        "import sys; from clip_rd_edge.benchmarking import results, run;"
        "from clip_rd_edge.benchmarking import report;"
        "results.this_environment(); print({'torch', 'onnxruntime', 'matplotlib'} & set(sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"


def test_no_file_of_a_report_has_the_folder_of_this_package_or_a_secret(results: Results, tmp_path: Path) -> None:
    """Which hints name, such as pip install -e FOLDER[train], and paths within a clone."""
    clone = tmp_path / "clone"
    reason, hint = f"There is no model folder {clone}.", f"pip install -e '{clone}[train]'"
    suite = msgspec.structs.replace(
        results.suite,
        root=str(clone),
        tasks=(f"{clone}/photos", f"{clone}s", "https://a.example/{0..9}.tar?sig=SECRET"),
    )
    skipped = (SkippedRow(label="x", model=str(clone / "models" / "x"), reason=reason, hint=hint),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "clip_rd_edge.installation._origin", lambda: {"url": clone.as_uri(), "dir_info": {"editable": True}}
        )
        write_report(msgspec.structs.replace(results, suite=suite, skipped=skipped), tmp_path / "report")
    for path in (tmp_path / "report").iterdir():
        assert f"{clone}/".encode() not in path.read_bytes()
        assert f"{clone}[".encode() not in path.read_bytes()
        assert b"SECRET" not in path.read_bytes()
    read = read_results(tmp_path / "report")
    assert read.skipped[0].hint == "pip install 'clip-rd-edge[train]'"
    assert read.suite.tasks == ("clip-rd-edge/photos", f"{clone}s", "https://a.example/{0..9}.tar")
    assert read.samples == results.samples
