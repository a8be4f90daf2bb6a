from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from clip_rd_edge.installation import install_command
from clip_rd_edge.runtime import doctor
from clip_rd_edge.runtime.backends import onnxruntime as int8_kernels

Run = Callable[..., tuple[int, str, str]]


def test_thread_limits_of_a_container_or_a_variable_are_reported() -> None:
    assert doctor._threads(2, 8, None).detail == "2 of 8 cores are usable"
    assert doctor._threads(8, 8, "1").detail.startswith("8 cores; OMP_NUM_THREADS=1")
    expected = "8 cores, limited to the time of 1.5: run bundles with --threads 1"
    assert doctor._threads(8, 8, None, 1.5).detail == expected
    assert doctor._threads(2, 8, None, 4.0).detail == "2 of 8 cores are usable"


def test_a_missing_extra_is_reported_with_its_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "is_installed", lambda package: package != "torch")
    train = next(finding for finding in doctor.examine() if finding.what == "[train]")
    assert train.state == "missing"
    assert train.detail.endswith("needs torch")
    assert train.remedy == install_command("train")


def test_an_opencv_of_another_name_is_not_to_be_installed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "is_installed", lambda package: False)
    for module, state in ((ModuleSpec("cv2", None), "ok"), (None, "missing")):
        monkeypatch.setattr(doctor, "find_spec", lambda name, module=module: {"cv2": module}[name])
        assert doctor._extra("camera", ["opencv-python-headless"]).state == state


def test_every_extra_except_the_combined_ones_is_checked() -> None:
    assert {"train", "emoji"} <= doctor.extras().keys()
    assert not {"all", "dev", "torch-tensorrt"} & doctor.extras().keys()
    assert "onnxscript" in doctor.extras()["train"]
    assert [extra for extra in doctor.extras() if not doctor.EXTRAS.get(extra)] == []  # each says what it is for


def test_an_extra_that_needs_a_newer_onnx_runtime_does_not_ask_for_it_beside_the_gpu_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = ["onnxruntime>=1.18", 'torch>=2.4; extra == "train"', 'onnxruntime>=1.19; extra == "train"']
    monkeypatch.setattr(doctor, "requires", lambda package: lines)
    assert doctor.extras() == {"train": ["torch"]}


@pytest.mark.parametrize(("system", "uvloop"), [("linux", ["uvloop"]), ("darwin", ["uvloop"]), ("win32", [])])
def test_an_extra_asks_for_no_package_of_another_system(
    system: str, uvloop: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        """torch>=2.4; sys_platform != "darwin" and extra == 'train'""",
        """torch>=2.5; (sys_platform == "darwin") and extra == 'train'""",
        """uvloop>=0.19; sys_platform != 'win32' and extra == "serve\"""",
        'uvicorn; extra == "serve"',
    ]
    monkeypatch.setattr(doctor, "requires", lambda package: lines)
    monkeypatch.setattr("sys.platform", system)
    assert doctor.extras() == {"train": ["torch"], "serve": [*uvloop, "uvicorn"]}


@pytest.mark.parametrize(
    ("driver", "jetson", "remedy"),
    [
        (True, "", 'pip install "onnxruntime-gpu[cuda,cudnn]"'),
        (False, "", ""),
        (True, "jetson-orin", ""),
    ],
)
def test_a_provider_that_is_compiled_in_and_does_not_start_is_reported_with_what_it_needs(
    driver: bool, jetson: str, remedy: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    names = ["CUDAExecutionProvider", "OpenVINOExecutionProvider", "CPUExecutionProvider"]
    cpu_session = onnxruntime.InferenceSession

    def open_session(model: object, options: object, *, providers: list[object], **rest: object) -> object:
        opened = cpu_session(model, options, providers=["CPUExecutionProvider"])
        if providers[0][0] == names[1]:  # type: ignore[index]
            monkeypatch.setattr(opened, "get_providers", lambda: names[1:])
        return opened

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(doctor.shutil, "which", lambda program: f"/usr/bin/{program}" if driver else None)
    monkeypatch.setattr(doctor, "jetson_name", lambda: jetson)
    finding = doctor._onnxruntime()
    assert (finding.state, finding.remedy) == ("missing", remedy)
    assert finding.detail.endswith(
        "for cpu, openvino; bundles run on cpu; --device also takes openvino; cuda does not start: its provider could "
        "not be loaded, which needs NVIDIA's driver, CUDA and cuDNN"
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("package", ["onnxruntime", "onnxruntime-openvino"])
def test_wrong_sums_of_int8_are_reported_with_the_versions_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_kernels, "wrong_sums", lambda: "ONNX Runtime 1.23.0 gets sums of INT8 wrong")
    monkeypatch.setattr(doctor, "is_installed", lambda name: name == package)
    finding = doctor._onnxruntime()
    assert finding.state == "ok"
    assert finding.detail.endswith("; bundles run on cpu. ONNX Runtime 1.23.0 gets sums of INT8 wrong")
    assert finding.remedy == f'pip install "{package}!=1.21.*,!=1.22.*,!=1.23.*,!=1.24.*"'


def test_a_gpu_that_only_lacks_a_package_gets_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(doctor, "is_installed", lambda package: package != "onnxruntime-gpu")
    assert 'pip install "onnxruntime-gpu[cuda,cudnn]"' in doctor._gpu().remedy
    monkeypatch.setattr(doctor, "is_installed", lambda package: True)
    assert doctor._gpu().remedy == ""


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


def test_the_doctor_command(command_line: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output, error = command_line("doctor")
    assert (code, error) == (0, "")
    assert "for cpu; bundles run on cpu" in output
    assert "emoji" in output
    assert "[emoji]" not in output
    assert max(map(len, output.splitlines())) <= 100
    code, output, _ = command_line("doctor", "--extras")
    assert "[emoji]" in output
    code, output, _ = command_line("doctor", "--json")
    assert {"machine", "processor", "threads", "ONNX Runtime", "GPU"} <= {
        finding["what"] for finding in json.loads(output)
    }
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, output, error = command_line("doctor")
    assert code == 1
    assert "ONNX Runtime │ broken" in output.splitlines()[1]
    assert error.startswith("error: No bundle can run here: ONNX Runtime cannot be imported")
    code, output, _ = command_line("doctor", "--json")
    assert code == 1
    assert "broken" in {finding["state"] for finding in json.loads(output)}
