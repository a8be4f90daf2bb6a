"""A fixed piece of work that is timed beside every model, so that the machine's own pace is known.

Two runs at different times differ by how fast the machine was, too: its clock, and what else ran on it. What a model
took is therefore compared as a multiple of what this took in the same minute.
"""

from __future__ import annotations

import base64
from collections.abc import Callable

import numpy as np

from clip_rd_edge.runtime.backends.onnxruntime import open_session

NAME = "\0reference"  # no row's label
# onnx.helper's model of one node, y = MatMul(x, w), opset 17, IR version 8: a device has no `onnx` to make it with.
MODEL = base64.b64decode(
    "CAgSADpjChEKAXgKAXcSAXkiBk1hdE11bBIJcmVmZXJlbmNlWhUKAXgSEAoOCAESCgoDEgFOCgMSAUtaFQoBdxIQCg4IARIKCgMSAUsKAxIBTWIV"
    "CgF5EhAKDggBEgoKAxIBTgoDEgFNQgQKABAR"
)
# 134 million operations on 4.8 MB: one or two milliseconds on a core of a server, and more than its own cache holds.
SHAPES = {"x": (64, 512), "w": (512, 2048)}


def reference_call(*, threads: int | None) -> Callable[[], object]:
    """The work, on as many threads as the models have."""
    session = open_session(MODEL, threads=threads)
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    return lambda: session.run(None, feed)
