"""What torch takes where nothing is said: float32 on the CPU, whatever a host program has set for its own models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from clip_rd_edge.utils.process import SharedBlock

_CPU = torch.device("cpu")


@contextmanager
def float32_on_cpu() -> Iterator[None]:
    """Within the block, new tensors are in float32 and on the CPU unless their dtype or device is given.

    Models must be built, trained and exported so: libraries create weights and constants with torch's defaults. The
    default dtype is that of all threads, so a host's that it has changed is away until the last thread has left.
    """
    with _FLOAT32, on_cpu():
        yield


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within the block, new tensors of this thread are on the CPU unless their device is given."""
    # It costs time in each operation, so it is entered only where it changes something.
    with nullcontext() if torch.get_default_device() == _CPU else _CPU:
        yield


@contextmanager
def _float32() -> Iterator[None]:
    previous = torch.get_default_dtype()
    if previous == torch.float32:  # and if another thread changes it meanwhile, that stays
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


_FLOAT32 = SharedBlock(_float32)
