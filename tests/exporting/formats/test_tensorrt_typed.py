"""The strongly typed ONNX for TensorRT in INT8, tested without TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.formats import tensorrt as strongly_typed
from clip_rd_edge.exporting.formats.tensorrt import TypedTower
from clip_rd_edge.exporting.int8.search import TowerSamples
from clip_rd_edge.exporting.parity import agreement, embed
from clip_rd_edge.exporting.plan import Budget
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.reporting import SILENT


def _int8_tower(bundle: Path, calibration: CalibrationSet) -> TypedTower:
    calibrate, held_out = calibration.calibrate.pixels[:8], calibration.held_out.pixels
    samples = TowerSamples("image", calibrate, held_out, adapt=False)
    return strongly_typed._int8_tower(bundle / "image.onnx", samples, calibrate, Budget(image=0.9), SILENT)


def _change_weights(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[TensorProto]], None]) -> None:
    """Change the INT8 weights of each tower when its other layers are rounded to float16."""
    to_fp16 = strongly_typed.to_fp16

    def changed(model: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
        typed = to_fp16(model, **options)
        change([tensor for tensor in typed.graph.initializer if tensor.data_type == TensorProto.INT8])
        return typed

    monkeypatch.setattr(strongly_typed, "to_fp16", changed)


def test_the_note_has_the_agreement_of_the_file_that_is_shipped(
    fp32_bundle: Path, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shift(weights: list[TensorProto]) -> None:
        """Change the largest weight a little, as rounding to float16 might."""
        weight = max(weights, key=lambda tensor: len(tensor.raw_data))
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) // 4 * 4, weight.name))

    _change_weights(monkeypatch, shift)
    tower = _int8_tower(fp32_bundle, calibration)
    pixels = calibration.held_out.pixels
    reference = embed(open_session(str(fp32_bundle / "image.onnx")), pixels)
    shipped = agreement(reference, embed(open_session(tower.content), pixels)).centred_cosine
    assert tower.precision == "int8 symmetric"
    assert f"Its centred cosine with float32 is {shipped:.4f}, measured" in tower.note


def test_a_tower_that_float16_spoils_beside_int8_is_not_shipped(
    fp32_bundle: Path, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(weights: list[TensorProto]) -> None:
        for tensor in weights:
            if len(tensor.dims) > 1:
                flipped = np.ascontiguousarray(numpy_helper.to_array(tensor)[::-1])
                tensor.CopyFrom(numpy_helper.from_array(flipped, tensor.name))

    _change_weights(monkeypatch, spoil)
    tower = _int8_tower(fp32_bundle, calibration)
    assert (tower.precision, tower.note) == ("fp16", "fp16: INT8 does not reach a centred cosine of 0.9.")
