"""Run engines with fakes of TensorRT and CUDA, which need no GPU; a fake engine is an ONNX file."""

# ruff: noqa: N802, N815 — the names of the CUDA functions

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from PIL import Image
from support import rewrite

from clip_rd_edge.bundle.manifest import Manifest, read_manifest, write_manifest
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.verify import verify_bundle
from clip_rd_edge.utils.files import sha256_of

MAX_BATCH = 2


class Code(IntEnum):
    GOOD, BAD = 0, 2


class FakeCuda:
    """A fake of cuda.bindings.runtime that keeps GPU memory in this process."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self) -> None:
        self.gpus, self.max_bytes = 1, 1 << 20
        self.allocated: dict[int, Any] = {}

    def cudaGetDeviceCount(self) -> tuple[Code, int | None]:
        return (Code.GOOD, self.gpus) if self.gpus >= 0 else (Code.BAD, None)

    def cudaGetErrorString(self, error: Code) -> tuple[Code, bytes]:
        return Code.GOOD, b"out of memory" if self.gpus >= 0 else b"no driver"

    def cudaMalloc(self, size: int) -> tuple[Code, int | None]:
        if size > self.max_bytes:
            return Code.BAD, None
        buffer = ctypes.create_string_buffer(size)
        self.allocated[ctypes.addressof(buffer)] = buffer
        return Code.GOOD, ctypes.addressof(buffer)

    def cudaFree(self, address: int) -> tuple[Code]:
        del self.allocated[address]
        return (Code.GOOD,)

    def cudaStreamCreate(self) -> tuple[Code, str]:
        return Code.GOOD, "stream"

    def cudaStreamSynchronize(self, stream: str) -> tuple[Code]:
        return (Code.GOOD if stream == "stream" else Code.BAD,)

    cudaStreamDestroy = cudaStreamSynchronize

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: str) -> tuple[Code]:
        address = target if kind == 1 else source
        assert address in self.allocated
        assert size <= ctypes.sizeof(self.allocated[address])
        ctypes.memmove(target, source, size)
        return (Code.GOOD,)


class FakeEngine:
    """A fake of ICudaEngine and IExecutionContext in one, which runs an ONNX Runtime session."""

    def __init__(self, content: bytes) -> None:
        self._session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
        self._input, self._output = self._session.get_inputs()[0], self._session.get_outputs()[0]
        self.num_io_tensors = 2
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}

    def create_execution_context(self) -> FakeEngine:
        return self

    def get_tensor_name(self, i: int) -> str:
        return str((self._input, self._output)[i].name)

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == self._input.name else "out"

    def get_tensor_dtype(self, name: str) -> type:
        return np.int64 if name == self._input.name and "int64" in self._input.type else np.float32

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        rest = tuple(self._input.shape[1:])
        return [(1, *rest), (1, *rest), (MAX_BATCH, *rest)]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert 1 <= shape[0] <= MAX_BATCH
        self._shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape if name == self._input.name else (self._shape[0], 3)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: str) -> bool:
        assert stream == "stream"
        dtype = np.dtype(self.get_tensor_dtype(self._input.name))
        size = int(np.prod(self._shape)) * dtype.itemsize
        content = ctypes.string_at(self._addresses[self._input.name], size)
        values = np.frombuffer(content, dtype).reshape(self._shape)
        (result,) = self._session.run(None, {self._input.name: values})
        ctypes.memmove(self._addresses[self._output.name], result.ctypes.data, result.nbytes)
        return True


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Install the fakes."""

    class Runtime:
        def __init__(self, logger: object) -> None:
            pass

        def deserialize_cuda_engine(self, content: bytes) -> FakeEngine | None:
            return None if content == b"another GPU's" else FakeEngine(content)

    trt = ModuleType("tensorrt_rtx_bindings")
    trt.__dict__.update(
        __version__="1.0", Runtime=Runtime, TensorIOMode=SimpleNamespace(INPUT="in"), nptype=lambda dtype: dtype
    )
    trt.__dict__["Logger"] = type("Logger", (), {"ERROR": 1, "__init__": lambda self, severity: None})
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", trt)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)  # type: ignore[arg-type]
    yield fake
    gc.collect()  # an exception that a test keeps refers to its encoder
    assert fake.allocated == {}  # every engine's memory was freed


@pytest.fixture
def engines(colour_bundle: Path) -> Path:
    """The colour bundle with engines for an RTX card."""
    manifest = read_manifest(colour_bundle)
    towers = {}
    for name, tower in (("image", manifest.image), ("text", manifest.text)):
        (colour_bundle / f"{name}.engine").write_bytes((colour_bundle / tower.file).read_bytes())
        towers[name] = msgspec.structs.replace(tower, engine=f"{name}.engine")
    write_manifest(colour_bundle, msgspec.structs.replace(manifest, target="tensorrt-rtx sm89", **towers))
    return colour_bundle


def test_engines_match_their_onnx_files_and_split_large_batches(cuda: FakeCuda, engines: Path) -> None:
    encoder, expected = load(engines), load(engines, device="cpu")
    assert encoder.describe().runtime == "tensorrt"
    noise = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    np.testing.assert_allclose(encoder.encode_images(images), expected.encode_images(images), atol=1e-6)
    texts = ["red", "green blue", "yellow"]
    np.testing.assert_allclose(encoder.encode_texts(texts), expected.encode_texts(texts), atol=1e-6)
    assert (encoder.describe().device, expected.describe().runtime) == ("cuda", "onnxruntime")
    assert len(cuda.allocated) == 4


def test_the_engines_of_a_jetson_are_found_where_its_script_builds_them(cuda: FakeCuda, colour_bundle: Path) -> None:
    rewrite(colour_bundle, target="tensorrt jetson-orin")
    with pytest.raises(ConfigError) as raised:
        load(colour_bundle, runtime="tensorrt").encode_texts(["red"])
    assert "build.sh" in raised.value.hint
    _build_engines(colour_bundle)
    for device in ("auto", "tensorrt"):
        encoder = load(colour_bundle, device=device)
        encoder.encode_texts(["red"])
        assert encoder.describe().runtime == "tensorrt"


def _build_engines(bundle: Path) -> None:
    """Do what the bundle's build.sh does."""
    for name in ("image", "text"):
        (bundle / f"{name}.engine").write_bytes((bundle / f"{name}.onnx").read_bytes())
        files = [bundle / f"{name}.onnx", bundle / f"{name}.engine"]
        (bundle / f"{name}.engine.sha256").write_text("".join(f"{sha256_of(file)}  {file.name}\n" for file in files))


def test_an_engine_of_an_older_bundle_beside_a_newer_onnx_file_does_not_run(
    cuda: FakeCuda, colour_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = msgspec.structs.replace(read_manifest(colour_bundle), target="tensorrt jetson-orin")
    _build_engines(colour_bundle)
    model = onnx.load(colour_bundle / "text.onnx")  # a newer bundle, copied over the older one: green for red
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    table.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(table), 1, axis=1), "table"))
    onnx.save(model, colour_bundle / "text.onnx")
    _write_manifest_of_device(colour_bundle, manifest)
    with pytest.raises(ConfigError):
        load(colour_bundle, runtime="tensorrt").encode_texts(["red"])
    encoder = load(colour_bundle)
    assert encoder.encode_texts(["red"]).argmax() == 1
    assert encoder.encode_images([Image.new("RGB", (9, 9), (255, 0, 0))]).argmax() == 0
    assert encoder.describe().device == "cuda + cpu"
    (record,) = caplog.records
    assert "text.onnx runs on the CPU instead of its engine" in record.getMessage()
    failed = {check.what: check.detail for check in verify_bundle(colour_bundle) if not check.passed}
    assert list(failed) == ["text tower"]
    assert failed["text tower"].startswith(f"its engine did not run: {colour_bundle / 'text.engine'}")
    assert " To use the engine: build it again" in record.getMessage()
    _build_engines(colour_bundle)
    assert load(colour_bundle, runtime="tensorrt").encode_texts(["red"]).argmax() == 1


def _write_manifest_of_device(bundle: Path, manifest: Manifest) -> None:
    """Write a manifest that lists no engines and stamps, which the device adds."""
    added = {path: path.read_bytes() for path in bundle.glob("*.engine*")}
    for path in added:
        path.unlink()
    write_manifest(bundle, manifest)
    for path, content in added.items():
        path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda bundle: (bundle / "text.engine.sha256").unlink(),
        lambda bundle: (bundle / "text.engine.sha256").write_bytes(b"\xff\n"),
        lambda bundle: (bundle / "text.engine").write_bytes(b"half"),
    ],
)
def test_an_engine_without_its_stamp_does_not_run(
    cuda: FakeCuda, colour_bundle: Path, change: Callable[[Path], object]
) -> None:
    _build_engines(colour_bundle)
    manifest = msgspec.structs.replace(read_manifest(colour_bundle), target="tensorrt jetson-orin")
    _write_manifest_of_device(colour_bundle, manifest)
    load(colour_bundle, runtime="tensorrt").encode_texts(["red"])
    change(colour_bundle)
    with pytest.raises(ConfigError) as raised:
        load(colour_bundle, runtime="tensorrt").encode_texts(["red"])
    assert "build it again" in raised.value.hint


@pytest.mark.parametrize(("gpus", "engine"), [(-1, b""), (1, b"another GPU's")])
def test_an_engine_that_cannot_run_here_is_reported_and_its_onnx_runs(
    cuda: FakeCuda, engines: Path, caplog: pytest.LogCaptureFixture, gpus: int, engine: bytes
) -> None:
    cuda.gpus = gpus
    (engines / "image.engine").write_bytes(engine)
    rewrite(engines)
    red = [Image.new("RGB", (9, 9), (255, 0, 0))]
    with pytest.raises(ClipRdEdgeError):
        load(engines, runtime="tensorrt").encode_images(red)
    encoder = load(engines)
    assert encoder.encode_images(red).argmax() == 0
    assert encoder.describe().device.startswith("cpu")
    (record,) = caplog.records
    assert record.getMessage().startswith("image.onnx runs on the CPU instead of its engine. ")


def test_a_full_gpu_is_reported_and_leaks_no_memory(cuda: FakeCuda, engines: Path) -> None:
    cuda.max_bytes = 100
    with pytest.raises(ClipRdEdgeError, match="CUDA failed: out of memory"):
        load(engines, runtime="tensorrt").encode_images([Image.new("RGB", (9, 9))])


def test_the_real_bindings_have_the_names_that_the_fakes_have() -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra rtx")
    real = pytest.importorskip("cuda.bindings.runtime", reason="needs the extra rtx")
    for name in (key for key in vars(FakeCuda) if key.startswith("cuda")):
        assert hasattr(real, name)
    for name in (key for key in vars(FakeEngine) if not key.startswith("_")):
        assert hasattr(trt.ICudaEngine, name) or hasattr(trt.IExecutionContext, name)
    assert trt.TensorIOMode.INPUT != trt.TensorIOMode.OUTPUT
    assert trt.nptype(trt.float32) == np.float32
    assert trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine
