from __future__ import annotations

from typing import get_args

import pytest

from clip_rd_edge.bundle.formats import FORMATS, RUNTIMES, Format, Precision, Runtime, format_of, import_named
from clip_rd_edge.exporting.converters import Converter, converter_for
from clip_rd_edge.runtime.doctor import extras
from clip_rd_edge.runtime.encoder import BundleEncoder


@pytest.mark.parametrize("name", get_args(Format))
def test_every_format_has_a_converter_a_runtime_and_extras_that_exist(name: Format) -> None:
    info = FORMATS[name]
    assert isinstance(converter_for(name), Converter)
    assert issubclass(import_named(RUNTIMES[info.runtime]), BundleEncoder)
    assert set(info.precisions) <= set(get_args(Precision))
    assert set(info.extras) <= set(extras())
    assert format_of(info.runtime) is info


def test_the_lists_of_names_agree_with_the_registry() -> None:
    assert tuple(FORMATS) == get_args(Format)
    assert tuple(RUNTIMES) == get_args(Runtime)


def test_a_target_may_name_a_device_after_the_runtime_and_an_unknown_one_is_read_as_onnx() -> None:
    assert format_of("tensorrt-rtx sm89") is format_of("tensorrt jetson-orin") is FORMATS["trt"]
    assert format_of("a later one") is FORMATS["onnx"]
