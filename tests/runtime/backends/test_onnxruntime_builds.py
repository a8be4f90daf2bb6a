"""What is said of an ONNX Runtime that cannot be imported, and of two builds in one folder."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

import clip_rd_edge
from clip_rd_edge.errors import ClipRdEdgeError, UnreachableError, UsageError
from clip_rd_edge.runtime import doctor
from clip_rd_edge.runtime.backends import onnxruntime as onnxruntime_builds
from clip_rd_edge.runtime.backends.onnxruntime import choose_device, import_onnxruntime
from clip_rd_edge.runtime.verify import verify_bundle

Run = Callable[..., tuple[int, str, str]]
Install = Callable[[dict[str, str]], None]
PACKAGE = Path(clip_rd_edge.__file__).parent
OVERLAP = "onnxruntime and onnxruntime-gpu are installed in one folder, where each overwrites files of the other"
MEND_OVERLAP = "pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu==1.24.4"
BOTH = {"onnxruntime": "1.26.0", "onnxruntime-gpu": "1.24.4", "numpy": "2.4.6"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that sets which packages are installed, in which versions."""

    def install(versions: dict[str, str]) -> None:
        def installed_versions(packages: Sequence[str]) -> dict[str, str]:
            return {package: versions[package] for package in packages if package in versions}

        monkeypatch.setattr(onnxruntime_builds, "installed_versions", installed_versions)

    return install


def fail_to_import(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "onnxruntime":
                raise error

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


@pytest.mark.parametrize(
    ("error", "versions", "message", "hint"),
    [
        (
            ImportError(),
            {"onnxruntime": "1.18.0", "numpy": "2.4.6"},
            "onnxruntime 1.18.0 needs NumPy 1, not 2.4.6",
            'pip install "numpy<2"',
        ),
        (ImportError(), {"onnxruntime": "1.19.2", "numpy": "2.4.6"}, "ImportError", "pip install -U onnxruntime"),
        (
            ImportError("libcudart.so.12: cannot open shared object file"),
            {"onnxruntime-gpu": "1.20.1", "numpy": "1.26.4"},
            "libcudart.so.12: cannot open shared object file",
            "pip install -U onnxruntime-gpu",
        ),
        (
            ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"),
            {"numpy": "2.4.6"},
            "No module named 'onnxruntime'",
            "pip install onnxruntime",
        ),
        (AttributeError("module 'numpy' has no attribute 'x'"), BOTH, OVERLAP, MEND_OVERLAP),
    ],
)
def test_an_onnx_runtime_that_cannot_be_imported_is_told_with_the_command_that_mends_it(
    error: Exception,
    versions: dict[str, str],
    message: str,
    hint: str,
    installed: Install,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(versions)
    fail_to_import(monkeypatch, error)
    with pytest.raises(ClipRdEdgeError) as raised:
        import_onnxruntime()
    assert (str(raised.value), raised.value.hint) == (f"ONNX Runtime cannot be imported: {message}.", hint)
    finding = doctor._onnxruntime()
    assert (finding.state, finding.detail, finding.remedy) == ("broken", f"cannot be imported: {message}", hint)


def test_a_folder_from_which_another_build_was_uninstalled_is_told(
    installed: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed({"onnxruntime-openvino": "1.24.1", "numpy": "2.4.6"})
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    with pytest.raises(ClipRdEdgeError) as raised:
        import_onnxruntime()
    assert str(raised.value) == "ONNX Runtime cannot be imported: files of onnxruntime-openvino are missing."
    assert raised.value.hint == "pip install --force-reinstall --no-deps onnxruntime-openvino==1.24.1"


def test_a_machine_at_its_limits_is_not_taken_for_a_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_import(monkeypatch, OSError(24, "Too many open files", "onnxruntime/__init__.py"))
    with pytest.raises(UnreachableError, match="Too many open files"):
        import_onnxruntime()


def test_commands_say_what_is_wrong_with_onnx_runtime_and_not_with_the_bundle(
    command_line: Run,
    colour_bundle: Path,
    colour_images: Path,
    tmp_path: Path,
    installed: Install,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed({"onnxruntime": "1.18.0", "numpy": "2.4.6"})
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    sentence = "ONNX Runtime cannot be imported: onnxruntime 1.18.0 needs NumPy 1, not 2.4.6."
    for arguments in (
        ("classify", colour_bundle, colour_images, "--labels", "red", "blue", "--no-cache"),
        ("classify", colour_bundle, colour_images, "--labels", "red", "--device", "cuda"),
        ("index", colour_bundle, colour_images, "-o", tmp_path / "index"),
    ):
        code, output, error = command_line(*arguments)
        assert (code, output) == (1, "")
        assert f'error: {sentence}\nhint: pip install "numpy<2"\n' in error
    failed = [check for check in verify_bundle(colour_bundle) if not check.passed]
    assert {check.what for check in failed} == {"image tower", "text tower"}
    assert {(check.detail, check.hint) for check in failed} == {(sentence, 'pip install "numpy<2"')}


def test_two_builds_in_one_folder_are_told_where_a_device_is_missed(
    command_line: Run,
    colour_bundle: Path,
    colour_images: Path,
    installed: Install,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finding = doctor._onnxruntime()
    assert finding.state == "ok"
    installed(BOTH)
    before, after = msgspec.structs.asdict(finding), msgspec.structs.asdict(doctor._onnxruntime())
    assert {key: value for key, value in after.items() if value != before[key]} == {
        "state": "missing",
        "detail": f"{finding.detail}. {OVERLAP}",
        "remedy": MEND_OVERLAP,
    }
    with pytest.raises(UsageError, match=f"no provider for cuda; it has cpu: {OVERLAP}.") as raised:
        choose_device("cuda", ["CPUExecutionProvider"], precision="fp32")
    assert raised.value.hint == MEND_OVERLAP
    with pytest.raises(UsageError, match=r"no provider for openvino; it has cpu\.$"):
        choose_device("openvino", ["CPUExecutionProvider"], precision="fp32")
    monkeypatch.setattr(onnxruntime_builds, "pip", lambda action: f"uv pip {action}")
    cuda = ("--labels", "red", "--device", "cuda")
    error = command_line("classify", colour_bundle, colour_images, *cuda)[2]
    assert f"hint: uv {MEND_OVERLAP.replace('&& ', '&& uv ')}\n" in error  # with options of uv that classify lacks


def test_no_module_imports_onnx_runtime_itself() -> None:
    """What is imported from onnxruntime.quantization comes after a session was opened."""
    importing = [
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(name.name == "onnxruntime" for name in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == "onnxruntime")
    ]
    assert set(importing) == {"runtime/backends/onnxruntime.py"}
