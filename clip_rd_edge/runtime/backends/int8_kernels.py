"""Ask ONNX Runtime's kernels whether they compute INT8 rightly on this processor.

x86 processors without VNNI saturate 8-bit weights; see `exporting.int8.saturation`. On those with AMX, some versions of
ONNX Runtime get sums wrong, whatever the weights. A product of each kind is computed, because the flags of processors
are unknown on Windows and on Intel Macs, and builds of ONNX Runtime differ.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.manifest import can_saturate
from clip_rd_edge.runtime.backends.onnxruntime_builds import import_onnxruntime
from clip_rd_edge.runtime.backends.session import open_session

_X86 = ("x86_64", "amd64", "x86", "i386", "i686")
_LENGTH, _ACTIVATION, _WEIGHT = 64, 255, 127
# The kernel for AMX takes 32 rows at once, and is wrong where 17 to 31 columns are left.
_ROWS, _COLUMNS = 64, 24
# The versions that `wrong_sums` asks for, as pip reads them. Python 3.10 has none after 1.23.
RIGHT_SUMS = "!=1.21.*,!=1.22.*,!=1.23.*,!=1.24.*"
# An ONNX file, as bytes because a device has no `onnx` to write one: c (M, N) int32 is the MatMulInteger of
# a (M, K) uint8 and b (K, N) int8.
PRODUCT = (
    b'\x08\x05:V\n\x18\n\x01a\n\x01b\x12\x01c"\rMatMulInteger\x12\x07product'
    b"Z\x0f\n\x01a\x12\n\n\x08\x08\x02\x12\x04\n\x00\n\x00Z\x0f\n\x01b\x12\n\n\x08\x08\x03\x12\x04\n\x00\n\x00"
    b"b\x0f\n\x01c\x12\n\n\x08\x08\x06\x12\x04\n\x00\n\x00B\x04\n\x00\x10\n"
)


def int8_fault(sets: Sequence[str], *, runtime: str) -> str:
    """Return why this CPU gives wrong answers for a tower's INT8, and what to do, or an empty string.

    Args:
        sets: the tower's `instruction_sets`, as in `bundle.manifest.Tower`.
        runtime: what runs the tower on the CPU.
    """
    if can_saturate(sets) and processor_saturates():
        return f"its INT8 holds for {' and '.join(sets)}, and this processor has no VNNI: export for any x86 processor"
    return wrong_sums() if sets and runtime == "onnxruntime" else ""


@cache
def processor_saturates() -> bool:
    """Return whether this processor saturates sums of U8 activations times S8 weights of 8 bits."""
    if not _is_x86():
        return False
    activations = np.full((1, _LENGTH), _ACTIVATION, dtype=np.uint8)
    weights = np.full((_LENGTH, 1), _WEIGHT, dtype=np.int8)
    sums = _product(activations, weights)
    return bool(sums[0, 0] != _LENGTH * _ACTIVATION * _WEIGHT)  # 1,048,544 on Haswell


@cache
def wrong_sums() -> str:
    """Return what is wrong if ONNX Runtime gets sums of INT8 products wrong here, and what to do, or an empty string.

    From 1.21 to 1.24, its kernel for AMX does, as in each convolution with 24 output channels
    (microsoft/onnxruntime#27671).
    """
    if not _is_x86():
        return ""
    # Weights of 7 bits, which do not saturate.
    activations = (np.arange(_ROWS * _LENGTH) % 251).astype(np.uint8).reshape(_ROWS, _LENGTH)
    weights = (np.arange(_LENGTH * _COLUMNS) % 127 - 63).astype(np.int8).reshape(_LENGTH, _COLUMNS)
    if np.array_equal(_product(activations, weights), activations.astype(np.int32) @ weights.astype(np.int32)):
        return ""
    ort = import_onnxruntime()
    return (
        f"ONNX Runtime {ort.__version__} gets sums of INT8 wrong on this processor: install onnxruntime 1.20, or 1.25 "
        "or newer"
    )


def _is_x86() -> bool:
    return platform.machine().lower() in _X86


def _product(activations: npt.NDArray[np.uint8], weights: npt.NDArray[np.int8]) -> npt.NDArray[np.int32]:
    session: Any = open_session(PRODUCT, threads=1)
    (sums,) = session.run(None, {"a": activations, "b": weights})
    return np.asarray(sums)
