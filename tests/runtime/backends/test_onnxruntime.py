from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image
from support import rewrite

from clip_rd_edge.errors import ClipRdEdgeError, UsageError, install_command
from clip_rd_edge.runtime import doctor
from clip_rd_edge.runtime.backends import onnxruntime as backend
from clip_rd_edge.runtime.backends.onnxruntime import (
    PROVIDERS,
    _open_on,
    choose_device,
    import_onnxruntime,
    open_session,
    processor_saturates,
    provider_list,
    wrong_sums,
)
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.verify import verify_bundle

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
RED = [Image.new("RGB", (9, 9), (255, 0, 0))]


@pytest.mark.parametrize(
    ("available", "precision", "chosen"),
    [
        ((CPU,), "fp32", "cpu"),
        ((TENSORRT, CUDA, CPU), "fp32", "cuda"),
        ((TENSORRT, CUDA, CPU), "int8 static (U8 activations, S8 weights)", "cpu"),
        (("OpenVINOExecutionProvider", CPU), "fp16", "openvino"),
    ],
)
def test_auto_chooses_a_device_by_providers_and_precision(
    available: tuple[str, ...], precision: str, chosen: str
) -> None:
    assert choose_device("auto", available, precision=precision) == chosen


def test_a_requested_device_is_used_or_refused_with_the_package_that_supports_it() -> None:
    assert choose_device("cuda", (CUDA, CPU), precision="int8") == "cuda"
    with pytest.raises(UsageError) as raised:
        choose_device("cuda", (CPU, "AzureExecutionProvider"), precision="fp32")
    assert "onnxruntime-gpu" in raised.value.hint
    for device in ("openvino", "openvino-gpu", "openvino-npu"):
        with pytest.raises(UsageError) as raised:
            choose_device(device, (CPU,), precision="fp32")
        assert raised.value.hint == install_command("openvino")


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
    rewrite(colour_bundle, image={"precision": "int8 static"})  # the device is chosen per tower
    assert load(colour_bundle).describe().device == "cpu + cuda"


@pytest.mark.parametrize(
    ("behaviour", "reason"), [("raises", "CUDA failure 35: driver version is insufficient"), ("falls back", "loaded")]
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
    assert reason in record.getMessage()


def test_each_model_has_its_own_folder_for_engines_that_tensorrt_finds_by_name_and_structure(
    colour_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, path = list[str](), colour_bundle / "image.onnx"

    def open_session(model: object, options: object, *, providers: list[Any], **rest: Any) -> Any:
        folders.append(providers[0][1]["trt_engine_cache_path"])
        raise RuntimeError("no driver")

    monkeypatch.setattr(ort, "InferenceSession", open_session)
    content = path.read_bytes()
    for model in (str(path), content):
        _open_on(ort, model, None, "tensorrt", None)
    assert len(set(folders)) == 1
    path.write_bytes(content.replace(b"mean", b"Mean"))
    _open_on(ort, str(path), None, "tensorrt", None)
    for weights in (b"weights", b"others"):  # of a tower above 2 GB
        (colour_bundle / "image.onnx.data").write_bytes(weights)
        _open_on(ort, str(path), None, "tensorrt", None)
    assert len(set(folders)) == 4


@pytest.mark.parametrize("device", ["cpu", "openvino", "cuda"])
def test_int8_saturates_in_every_provider_that_runs_on_the_cpu(
    device: str, colour_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["OpenVINOExecutionProvider", CUDA, CPU])
    monkeypatch.setattr(backend, "processor_saturates", lambda: True)
    monkeypatch.setattr(backend, "wrong_sums", lambda: "wrong sums")
    encoder = load(colour_bundle, device=device)
    for sets in (("x86-64-vnni", "aarch64"), ("x86-64", "aarch64")):
        tower = msgspec.structs.replace(encoder.manifest.image, instruction_sets=sets)
        reason = encoder.int8_fault(tower)
        assert ("has no VNNI" in reason) == (device != "cuda" and "x86-64" not in sets)
        assert ("wrong sums" in reason) == (device == "cpu" and "x86-64" in sets)  # OpenVINO has kernels of its own


MEND_OVERLAP = "pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu==1.24.4"
RENEW = "pip install -U --force-reinstall --no-deps"
BOTH = {"onnxruntime": "1.26.0", "onnxruntime-gpu": "1.24.4", "numpy": "2.4.6"}


@pytest.mark.parametrize(
    ("error", "versions", "hint"),
    [
        (ModuleNotFoundError(name="onnxruntime"), {"numpy": "2.4.6"}, f"{RENEW} onnxruntime"),
        (AttributeError("module 'numpy' has no attribute 'x'"), BOTH, MEND_OVERLAP),
    ],
)
def test_an_onnx_runtime_that_cannot_be_imported_is_told_with_the_command_that_mends_it(
    error: Exception, versions: dict[str, str], hint: str, colour_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "onnxruntime":
                raise error

    def installed_versions(packages: Sequence[str]) -> dict[str, str]:
        return {package: versions[package] for package in packages if package in versions}

    monkeypatch.setattr(backend, "installed_versions", installed_versions)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(ClipRdEdgeError) as raised:
        import_onnxruntime()
    assert (raised.value.exit_code, raised.value.hint) == (1, hint)
    finding = doctor._onnxruntime()
    assert (finding.state, finding.remedy) == ("broken", hint)
    failed = [check for check in verify_bundle(colour_bundle) if not check.passed]
    assert {(check.detail, check.hint) for check in failed} == {(str(raised.value), hint)}  # and not the bundle


@pytest.fixture(autouse=True)
def unasked() -> Iterator[None]:
    for probe in (processor_saturates, wrong_sums):
        probe.cache_clear()
    yield
    for probe in (processor_saturates, wrong_sums):
        probe.cache_clear()


@pytest.mark.parametrize(("total", "saturating"), [(2_072_640, False), (1_048_544, True)])
@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])  # AMD64 is Windows's name
def test_an_x86_processor_is_asked_once_by_a_product(
    machine: str, total: int, saturating: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Session:
        def run(self, names: None, feed: dict[str, Any]) -> list[Any]:
            asked.append(feed["a"].astype(np.int32) @ feed["b"].astype(np.int32))
            return [np.full_like(asked[0], total)]

    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(backend, "open_session", lambda content, *, threads: Session())
    assert [processor_saturates() for _ in range(3)] == [saturating] * 3
    assert [row.tolist() for row in asked] == [[[2_072_640]]]


class Sums:
    """A session that multiplies rightly but for `error` in one entry, as the kernel for AMX does in some versions."""

    def __init__(self, error: int) -> None:
        self.error, self.feeds = error, []  # type: ignore[var-annotated]

    def run(self, names: None, feed: dict[str, Any]) -> list[Any]:
        self.feeds.append(feed)
        sums = feed["a"].astype(np.int32) @ feed["b"].astype(np.int32)
        sums[31, 17] += self.error
        return [sums]


@pytest.mark.parametrize("error", [0, 1])
def test_wrong_sums_are_found_once_by_a_product_with_24_columns(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    session = Sums(error)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(backend, "open_session", lambda content, *, threads: session)
    monkeypatch.setattr(ort, "__version__", "1.23.0")
    expected = (
        "ONNX Runtime 1.23.0 gets sums of INT8 wrong on this processor: install onnxruntime 1.20, or 1.25 or newer"
    )
    assert [wrong_sums() for _ in range(3)] == [expected if error else ""] * 3
    ((activations, weights),) = (feed.values() for feed in session.feeds)
    assert (activations.shape, weights.shape) == ((64, 64), (64, 24))
    assert np.abs(weights.astype(int)).max() <= 64  # which do not saturate


def test_the_product_is_an_onnx_file_that_runs_here() -> None:
    onnx.checker.check_model(onnx.load_from_string(backend.PRODUCT))
    feed = {"a": np.full((2, 3), 2, np.uint8), "b": np.full((3, 2), -5, np.int8)}
    (product,) = open_session(backend.PRODUCT).run(None, feed)
    assert product.tolist() == [[-30, -30], [-30, -30]]
    assert processor_saturates() in (False, True)
