from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnxruntime as ort
import pytest
from PIL import Image

from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
from clip_rd_edge.errors import UsageError
from clip_rd_edge.installation import install_command
from clip_rd_edge.runtime.backends import onnxruntime as int8_kernels
from clip_rd_edge.runtime.backends.onnxruntime import PROVIDERS, _open_on, _preload_cuda, choose_device, provider_list
from clip_rd_edge.runtime.load import load

Run = Callable[..., tuple[int, str, str]]
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
RED = [Image.new("RGB", (9, 9), (255, 0, 0))]


@pytest.mark.parametrize(
    ("available", "precision", "chosen"),
    [
        ((CPU,), "fp32", "cpu"),
        ((TENSORRT, CUDA, CPU), "fp32", "cuda"),
        ((TENSORRT, CUDA, CPU), "int8 static (U8 activations, S8 weights)", "cpu"),
        (("CoreMLExecutionProvider", "AzureExecutionProvider", CPU), "fp32", "cpu"),
        (("OpenVINOExecutionProvider", CPU), "fp16", "openvino"),
    ],
)
def test_auto_chooses_a_device_by_providers_and_precision(
    available: tuple[str, ...], precision: str, chosen: str
) -> None:
    assert choose_device("auto", available, precision=precision) == chosen


def test_a_requested_device_is_used_or_refused_with_the_package_that_supports_it() -> None:
    assert choose_device("cuda", (CUDA, CPU), precision="int8") == "cuda"
    with pytest.raises(UsageError, match="no provider for cuda; it has cpu") as raised:
        choose_device("cuda", (CPU, "AzureExecutionProvider"), precision="fp32")
    assert "onnxruntime-gpu" in raised.value.hint
    for device in ("openvino", "openvino-gpu", "openvino-npu"):
        with pytest.raises(UsageError, match=f"no provider for {device}; it has cpu") as raised:
            choose_device(device, (CPU,), precision="fp32")
        assert raised.value.hint == install_command("openvino")
    with pytest.raises(UsageError, match="Unknown device 'gpu'; expected one of auto, cpu, cuda, tensorrt, coreml"):
        choose_device("gpu", (CPU,), precision="fp32")


@pytest.mark.parametrize("device", PROVIDERS)
def test_every_provider_list_ends_with_the_cpu(device: str, tmp_path: Path) -> None:
    providers = provider_list(device, cache=tmp_path, threads=3)
    assert (providers[0][0], providers[-1][0]) == (PROVIDERS[device].name, CPU)
    assert all(name in ort.get_all_providers() for name, _ in providers)
    assert all(isinstance(value, str) for _, options in providers for value in options.values())


@pytest.fixture
def cuda_package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Simulate onnxruntime-gpu: returns a function that sets how its CUDA provider starts."""
    real_session = ort.InferenceSession

    def install(behaviour: str) -> list[Any]:
        requested = []

        def open_session(model: object, options: object, *, providers: list[Any], **rest: Any) -> Any:
            requested.append(providers)
            session = real_session(model, options, providers=[CPU])
            if providers[0] == CPU or behaviour == "falls back":
                return session
            if behaviour == "raises":
                raise RuntimeError("CUDA failure 35: driver version\nis insufficient.")
            monkeypatch.setattr(session, "get_providers", lambda: [CUDA, CPU])
            return session

        monkeypatch.setattr(ort, "InferenceSession", open_session)
        monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
        return requested

    return install


def test_a_float32_bundle_runs_on_the_gpu(colour_bundle: Path, cuda_package: Any) -> None:
    requested = cuda_package("starts")
    encoder = load(colour_bundle)
    assert encoder.describe().device == "cuda"  # the chosen device; nothing is loaded yet
    assert requested == []
    assert encoder.encode_images(RED).argmax() == 0
    assert [name for name, _ in requested[0]] == [CUDA, CPU]
    assert load(colour_bundle, device="cpu").describe().device == "cpu"


def test_the_device_is_chosen_per_tower(colour_bundle: Path, cuda_package: Any) -> None:
    cuda_package("starts")
    manifest = read_manifest(colour_bundle)
    image = msgspec.structs.replace(manifest.image, precision="int8 static")
    write_manifest(colour_bundle, msgspec.structs.replace(manifest, image=image))
    assert load(colour_bundle).describe().device == "cpu + cuda"


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("raises", "CUDA failure 35: driver version is insufficient; run clip-rd-edge doctor."),
        ("falls back", "loaded, which needs NVIDIA's driver, CUDA and cuDNN; run clip-rd-edge doctor."),
    ],
)
def test_a_provider_that_does_not_start_is_reported_once_and_the_cpu_is_used(
    colour_bundle: Path, cuda_package: Any, caplog: pytest.LogCaptureFixture, behaviour: str, reason: str
) -> None:
    cuda_package(behaviour)
    encoder = load(colour_bundle, device="cuda")
    assert encoder.encode_images(RED).argmax() == 0
    encoder.encode_images(RED)
    assert encoder.describe().device == "cpu + cuda"  # the text tower is not loaded yet
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("cuda does not start; ")
    assert "image.onnx runs on the CPU instead" in message
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("device", ["cuda", "tensorrt", "openvino"])
def test_the_libraries_of_cuda_that_pip_has_installed_are_loaded_once_and_print_nothing(
    device: str, colour_bundle: Path, cuda_package: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    cuda_package("starts")
    loads = list[str]()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA, "OpenVINOExecutionProvider", CPU])
    monkeypatch.setattr(ort, "preload_dlls", lambda: loads.append("once") or print("Failed to load"), raising=False)
    _preload_cuda.cache_clear()
    encoder = load(colour_bundle, device=device)
    encoder.encode_images(RED)
    encoder.encode_texts(["red"])
    assert loads == ["once"] * (device != "openvino")
    assert capfd.readouterr().out == ""
    _preload_cuda.cache_clear()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("std::bad_alloc"), "error: There is not enough memory to open "),
        (RuntimeError("Exception during initialization: std::bad_alloc"), "error: There is not enough memory to open "),
        (
            RuntimeError(
                "PosixThread pthread_create failed, error code: 11 error msg: Resource temporarily unavailable"
            ),
            "error: The system starts no further thread or process; raise their limit first: ulimit -u",
        ),
    ],
)
def test_a_machine_at_its_limits_is_not_taken_for_a_model_that_cannot_run(
    command_line: Run,
    colour_bundle: Path,
    colour_images: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(ort.InferenceSession, "_create_inference_session", fail)
    code, output, told = command_line("classify", colour_bundle, colour_images, "--labels", "red", "blue", "--no-cache")
    assert (code, output) == (1, "")  # ONNX Runtime prints that it tries the CPU once more
    assert told.startswith(message)


def test_each_model_has_its_own_folder_for_engines_that_tensorrt_finds_by_name_and_structure(
    colour_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []

    def open_session(model: object, options: object, *, providers: list[Any], **rest: Any) -> Any:
        folders.append(providers[0][1]["trt_engine_cache_path"])
        raise RuntimeError("no driver")

    monkeypatch.setattr(ort, "InferenceSession", open_session)
    path = str(colour_bundle / "image.onnx")
    content = (colour_bundle / "image.onnx").read_bytes()
    _open_on(ort, path, None, "tensorrt", None)
    _open_on(ort, content, None, "tensorrt", None)
    (colour_bundle / "image.onnx").write_bytes(content.replace(b"mean", b"Mean"))
    _open_on(ort, path, None, "tensorrt", None)
    for weights in (b"weights", b"others"):  # of a tower above 2 GB
        (colour_bundle / "image.onnx.data").write_bytes(weights)
        _open_on(ort, path, None, "tensorrt", None)
    assert folders[0] == folders[1]
    assert len(set(folders)) == 4


def test_threads_do_not_spin_while_other_threads_open_many_images(
    command_line: Run, colour_bundle: Path, colour_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spins = []

    class Session(ort.InferenceSession):  # type: ignore[misc]
        def __init__(self, model: str, options: ort.SessionOptions, **rest: Any) -> None:
            try:
                spins.append(options.get_session_config_entry("session.intra_op.allow_spinning"))
            except RuntimeError:
                spins.append("default")
            super().__init__(model, options, **rest)

    monkeypatch.setattr(ort, "InferenceSession", Session)
    image = colour_images / "red.png"
    assert command_line("classify", colour_bundle, image, "--labels", "red", "blue")[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{image}\n" * 60))
    assert command_line("classify", colour_bundle, "-", "--labels", "red", "green")[0] == 0
    assert spins == ["default", "default", "0", "0"]  # text tower and image tower


def test_classify_takes_a_device(command_line: Run, colour_bundle: Path, colour_images: Path) -> None:
    image = colour_images / "red.png"
    code, output, _ = command_line("classify", colour_bundle, image, "--labels", "red", "blue", "--device", "cpu")
    assert (code, output.split("\t")[1].startswith("red")) == (0, True)
    code, _, error = command_line("classify", colour_bundle, image, "--labels", "red", "--device", "cuda")
    assert code == 2
    assert "This ONNX Runtime has no provider for cuda" in error
    assert "hint: install onnxruntime-gpu in place of onnxruntime" in error


@pytest.mark.parametrize("device", ["cpu", "openvino", "cuda"])
def test_int8_saturates_in_every_provider_that_runs_on_the_cpu(
    device: str, colour_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["OpenVINOExecutionProvider", CUDA, CPU])
    monkeypatch.setattr(int8_kernels, "processor_saturates", lambda: True)
    monkeypatch.setattr(int8_kernels, "wrong_sums", lambda: "wrong sums")
    encoder = load(colour_bundle, device=device)
    for sets in (("x86-64-vnni", "aarch64"), ("x86-64", "aarch64")):
        tower = msgspec.structs.replace(encoder.manifest.image, instruction_sets=sets)
        reason = encoder.int8_fault(tower)
        assert ("has no VNNI" in reason) == (device != "cuda" and "x86-64" not in sets)
        assert ("wrong sums" in reason) == (device == "cpu" and "x86-64" in sets)  # OpenVINO has kernels of its own
