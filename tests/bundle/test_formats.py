from __future__ import annotations

from typing import get_args

import pytest

from clip_rd_edge.bundle.formats import FORMATS, Precision, Runtime, encoder_of, format_of
from clip_rd_edge.exporting.formats import Format
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.runtime.doctor import extras
from clip_rd_edge.runtime.encoder import BundleEncoder


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_has_a_runtime_and_extras_that_exist(name: str) -> None:
    info = FORMATS[name]
    assert issubclass(encoder_of(info.runtime), BundleEncoder)
    assert isinstance(Plan(format=name).converter, Format)
    assert format_of(info.runtime) is info
    assert set(info.precisions) <= set(get_args(Precision))
    assert set(info.extras) <= set(extras())
    assert info.runtime in get_args(Runtime)


def test_a_target_may_name_a_device_after_the_runtime_and_an_unknown_one_is_read_as_onnx() -> None:
    assert format_of("tensorrt-rtx sm89") is format_of("tensorrt jetson-orin") is FORMATS["trt"]
    assert format_of("a later one") is FORMATS["onnx"]
