"""Ask ONNX Runtime's kernels whether they saturate 8-bit weights on this processor.

x86 processors without VNNI do; see `convert.int8.saturation`. Their flags are unknown on Windows and on Intel Macs.
"""

from __future__ import annotations

import platform
from functools import cache

import numpy as np

_X86 = ("x86_64", "amd64", "x86", "i386", "i686")
_LENGTH, _ACTIVATION, _WEIGHT = 64, 255, 127
# An ONNX file, as bytes because a device has no `onnx` to write one: c (M, N) int32 is the MatMulInteger of
# a (M, K) uint8 and b (K, N) int8.
_PRODUCT = (
    b'\x08\x05:V\n\x18\n\x01a\n\x01b\x12\x01c"\rMatMulInteger\x12\x07product'
    b"Z\x0f\n\x01a\x12\n\n\x08\x08\x02\x12\x04\n\x00\n\x00Z\x0f\n\x01b\x12\n\n\x08\x08\x03\x12\x04\n\x00\n\x00"
    b"b\x0f\n\x01c\x12\n\n\x08\x08\x06\x12\x04\n\x00\n\x00B\x04\n\x00\x10\n"
)


@cache
def processor_saturates() -> bool:
    """Return whether this processor saturates sums of U8 activations times S8 weights of 8 bits."""
    if platform.machine().lower() not in _X86:
        return False
    from clip_rd_edge.runtime.backends.onnxruntime import open_session

    activations = np.full((1, _LENGTH), _ACTIVATION, dtype=np.uint8)
    weights = np.full((_LENGTH, 1), _WEIGHT, dtype=np.int8)
    (sums,) = open_session(_PRODUCT, threads=1).run(None, {"a": activations, "b": weights})
    return bool(sums[0, 0] != _LENGTH * _ACTIVATION * _WEIGHT)  # 1,048,544 on Haswell
