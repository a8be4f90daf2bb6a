from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import rewrite

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.runtime.backends import openvino as openvino_backend
from clip_rd_edge.runtime.backends.openvino import open_openvino
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.load import load

ROOT = Path(__file__).parents[3]


def test_embeddings_match_those_of_onnxruntime(colour_bundle: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    encoder, reference = load(colour_bundle, runtime="openvino", threads=1), load(colour_bundle)
    assert (encoder.describe().runtime, reference.describe().runtime) == ("openvino", "onnxruntime")
    noise = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    np.testing.assert_allclose(encoder.encode_images(images), reference.encode_images(images), atol=1e-5)
    first = encoder.encode_texts(["red", "green blue"])
    encoder.encode_texts(["blue", "yellow"])  # must not overwrite the first result
    np.testing.assert_allclose(first, reference.encode_texts(["red", "green blue"]), atol=1e-5)


def test_a_graph_of_openvino_under_the_name_of_onnx_is_not_read(colour_bundle: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="needs the extra openvino")
    path = colour_bundle / "image.onnx"
    openvino.save_model(openvino.Core().read_model(path), colour_bundle / "other.xml")
    (colour_bundle / "other.bin").rename(colour_bundle / "image.bin")  # of which the manifest has no checksum
    graph = b"<net" + (colour_bundle / "other.xml").read_bytes().partition(b"<net")[2]
    # The whole graph in one field of protobuf, which OpenVINO does not mind in front of it.
    assert 1 << 7 <= len(graph) < 1 << 14
    path.write_bytes(bytes([0x0A, len(graph) & 127 | 128, len(graph) >> 7]) + graph)
    openvino.Core().read_model(path)
    rewrite(colour_bundle)
    with pytest.raises(ConfigError):
        load(colour_bundle, runtime="openvino").encode_pixels(np.ones((1, 3, 8, 8), np.float32))


def test_any_batch_size_runs_but_only_a_few_are_compiled(colour_bundle: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    model, reference = open_openvino(str(colour_bundle / "image.onnx"), threads=1), load(colour_bundle)
    assert isinstance(reference, BundleEncoder)
    pixels = np.random.default_rng(0).standard_normal((7, 3, 8, 8)).astype(np.float32)
    for count in (7, 2, 5, 1, 3, 7):
        (embeddings,) = model.run(None, {model.get_inputs()[0].name: pixels[:count]})
        np.testing.assert_allclose(embeddings, reference.encode_pixels(pixels[:count]), atol=1e-5)
    assert sorted(model._requests) == [1, 2, 7]


def test_the_process_survives_a_signal_after_another_thread_freed_a_model(colour_bundle: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    script = f"""
import gc, signal, threading
from clip_rd_edge.runtime.backends.openvino import open_openvino
models = [open_openvino({str(colour_bundle / "image.onnx")!r})]
def free():
    models.clear()
    gc.collect()
thread = threading.Thread(target=free)
thread.start()
thread.join()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
signal.raise_signal(signal.SIGUSR1)"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "handled\n")


def test_openvino_sends_nothing_to_its_makers(tmp_path: Path) -> None:
    package = tmp_path / "openvino"
    package.mkdir()
    (package / "__init__.py").write_text(
        "try:\n    import openvino_telemetry\nexcept ImportError:\n    pass\nCore = int\n"
    )
    (tmp_path / "openvino_telemetry.py").write_text("print('sent')\n")
    script = "from clip_rd_edge.runtime.backends.openvino import _core; _core(); import openvino_telemetry"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    run = partial(subprocess.run, capture_output=True, text=True, check=True, env=environment)
    alone = run([sys.executable, "-c", script.partition("; import")[0]])
    with_it = run([sys.executable, "-c", script])
    assert (alone.stdout, with_it.stdout) == ("", "sent\n")  # a program may import it afterwards


def test_a_damaged_file_is_reported_in_one_line(colour_bundle: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    (colour_bundle / "image.onnx").write_bytes(b"\x08\x05")  # of a version alone
    rewrite(colour_bundle)  # else its checksum is the first to refuse it
    with pytest.raises(ConfigError) as raised:
        load(colour_bundle, runtime="openvino").encode_images([Image.new("RGB", (8, 8))])
    assert "\n" not in str(raised.value)


class _Core:
    """OpenVINO's Core on a machine that has a GPU and an NPU as well: it compiles for the CPU, and keeps the calls."""

    available_devices = ("CPU", "GPU.0", "GPU.1", "NPU")

    def __init__(self, core: Any) -> None:
        self._core = core
        self.read_model = core.read_model
        self.compiled: list[tuple[str, dict[str, Any]]] = []

    def compile_model(self, model: Any, processor: str, settings: dict[str, Any]) -> Any:
        self.compiled.append((processor, settings))
        return self._core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> _Core:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    core = _Core(openvino_backend._core())
    monkeypatch.setattr(openvino_backend, "_core", lambda: core)
    return core


@pytest.mark.parametrize(
    ("device", "processor"),
    [
        ("auto", "CPU"),
        ("cpu", "CPU"),
        ("openvino", "CPU"),
        ("openvino-bf16", "CPU"),
        ("openvino-gpu", "GPU"),
        ("openvino-npu", "NPU"),
    ],
)
def test_a_bundle_for_openvino_runs_on_each_of_its_processors(
    device: str, processor: str, colour_bundle: Path, core: _Core
) -> None:
    rewrite(colour_bundle, target="openvino")
    encoder = load(colour_bundle, device=device, threads=2)
    description = encoder.describe()
    is_bf16 = device == "openvino-bf16"
    assert (description.runtime, description.device) == ("openvino", "cpu-bf16" if is_bf16 else processor.lower())
    assert encoder.encode_images([Image.new("RGB", (9, 9), (255, 0, 0))]).argmax() == 0
    ((used, settings),) = core.compiled
    assert used == processor
    assert ("INFERENCE_NUM_THREADS" in settings) == (processor == "CPU")  # others have none, and refuse the setting
    assert settings.get("INFERENCE_PRECISION_HINT") == (None if processor == "NPU" else "bf16" if is_bf16 else "f32")
    assert ("CACHE_DIR" in settings) == (processor != "CPU")
