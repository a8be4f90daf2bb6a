from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from benchmarks.devices import mobile
from clip_rd_edge.models.clip import ClipModel


def test_a_preset_that_was_not_converted_is_in_the_table_with_its_reason() -> None:
    rows = (
        mobile.Converted(preset="a", max_difference=2e-7, fp16_cosine=0.999999, fp32_mb=4, fp16_mb=2, ms=3, onnx_ms=6),
        mobile.Converted(preset="b", error="litert-torch cannot convert it."),
    )
    bundle = mobile.Compared(
        tower="image", runtime="litert", precision="int8", size_mb=1, ms=2, max_difference=0.01, centred_cosine=0.9954
    )
    table = mobile.table(mobile.Results(machine="here", date="today", rows=rows, bundles=(bundle,)))
    assert "| a | 2.0e-07 | 4.0 | 2.0 | 0.999999 | 3.0 / 6.0 = 0.50 |" in table
    assert "| b | not converted: litert-torch cannot convert it. |" in table
    assert "| image | litert | int8 | 1.0 | 2.00 | 1.0e-02 | 0.9954 |" in table


def test_a_column_that_a_format_has_no_values_for_is_left_out() -> None:
    rows = (mobile.Converted(preset="a", fp32_mb=4, fp16_mb=2), mobile.Converted(preset="b", error="No."))
    lines = mobile.table(mobile.Results(machine="here", date="today", format="coreml", rows=rows)).splitlines()
    assert lines[2:] == [
        "| image tower | FP32, MB | FP16, MB |",
        "| --- | ---: | ---: |",
        "| a | 4.0 | 2.0 |",
        "| b | not converted: No. | – |",
    ]


def test_no_layer_of_a_preset_is_multiplied_by_0(make_student: Callable[..., ClipModel]) -> None:
    model = make_student().model
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    assert not all(norm.weight.any() for norm in norms)  # LiteRT's file of such a resnet10t has 1 MB instead of 20
    mobile.use_all_layers(model)
    assert all(norm.weight.all() for norm in norms)


def test_processor_time_leaves_out_what_other_programs_take() -> None:
    def work() -> None:
        end = time.thread_time() + 0.002
        while time.thread_time() < end:
            pass

    times = mobile.processor_ms({"waits": lambda: time.sleep(0.01), "works": work}, rounds=3)
    assert times["waits"] < 1.5 < times["works"]


def test_a_bundle_agrees_with_itself(colour_bundle: Path) -> None:
    from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
    from clip_rd_edge.exporting.parity import NodeByNode, add_reference

    add_reference(colour_bundle, NodeByNode(colour_bundle, read_manifest(colour_bundle)))
    write_manifest(colour_bundle, read_manifest(colour_bundle))
    rows = mobile.compare_bundles([colour_bundle, colour_bundle])
    assert [(row.tower, row.runtime) for row in rows] == [("image", "onnxruntime"), ("text", "onnxruntime")]
    assert all(row.max_difference == 0 and row.centred_cosine == pytest.approx(1) for row in rows)
