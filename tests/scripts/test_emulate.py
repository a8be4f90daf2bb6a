"""Towers on emulated processors; needs `apt-get install qemu-user-static`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from emulate import environment_of, interpreter
from onnx import TensorProto, helper, numpy_helper

from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.convert.graph import prepare_for_quantization
from clip_rd_edge.convert.int8.static import StaticQuantizer
from clip_rd_edge.convert.options import WeightBits
from clip_rd_edge.convert.parity import embed
from clip_rd_edge.runtime.backends.onnxruntime import open_session

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("qemu-x86_64-static"), reason="qemu-user-static is not installed"),
]

RUN_TOWER = """
import sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
np.save(sys.argv[3], session.run(None, {session.get_inputs()[0].name: np.load(sys.argv[2])})[0])
"""


@pytest.mark.parametrize("bits", [7, 8])
def test_only_8_bit_weights_saturate_on_an_x86_processor_without_vnni(bits: WeightBits, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0.5, 1, (8, 16, 8, 8)).astype(np.float32)
    model = prepare_for_quantization(_tower_of_signs(tmp_path), tmp_path)
    quantizer = StaticQuantizer(model, pixels, weight_bits=bits)
    content = quantizer.quantize("min-max", quantizer.layers)
    native = embed(open_session(content), pixels)
    difference = np.abs(_embed_on("Haswell", content, pixels, tmp_path) - native).max() / np.abs(native).max()
    assert difference < 0.01 if bits == 7 else difference > 0.1, difference


def _tower_of_signs(folder: Path) -> Path:
    """A convolution whose weights are all 1 or -1, so that many neighbouring products are large and of one sign."""
    weights = np.random.default_rng(1).choice(np.float32([-1, 1]), (32, 16, 3, 3))
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "weights"], ["features"], name="conv"),
            helper.make_node("GlobalAveragePool", ["features"], ["means"], name="pool"),
            helper.make_node("Flatten", ["means"], ["y"], name="flatten"),
        ],
        "tower",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 32])],
        [numpy_helper.from_array(weights, "weights")],
    )
    path = folder / "signs.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def _embed_on(processor: str, content: bytes, pixels: np.ndarray, folder: Path) -> Embeddings:
    (folder / "tower.onnx").write_bytes(content)
    np.save(folder / "pixels.npy", pixels)
    files = [str(folder / name) for name in ("tower.onnx", "pixels.npy", "embeddings.npy")]
    subprocess.run(
        [*interpreter(processor), "-c", RUN_TOWER, *files],
        env=environment_of(processor),
        check=True,
        timeout=300,
        capture_output=True,
    )
    embeddings: Embeddings = np.load(folder / "embeddings.npy")
    return embeddings
