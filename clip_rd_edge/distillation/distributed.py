"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from clip_rd_edge.models.clip import default_device


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many, and where it computes.

    Every method does nothing but what one process needs where there is one.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all processes in the order of their ranks, (b, D) to (count · b, D); no gradient flows through."""
        if self.count == 1:
            return rows
        gathered = [torch.empty_like(rows) for _ in range(self.count)]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    def own(self, rows: Tensor) -> Tensor:
        """This process's part of what `gather` returned."""
        size = len(rows) // self.count
        return rows[self.rank * size : (self.rank + 1) * size]

    def add_up(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace each tensor by its sum over processes, in one message a dtype; None stays None."""
        if self.count == 1:
            return
        present = [tensor for tensor in tensors if tensor is not None]
        for dtype in dict.fromkeys(tensor.dtype for tensor in present):
            group = [tensor for tensor in present if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            for tensor, part in zip(group, torch.split(flat, [tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def share_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the first process's: batch norms' running figures, as DDP does."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.count == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def total(self, own: int) -> int:
        """The sum of a number over processes."""
        if self.count == 1:
            return own
        value = torch.tensor(own, device=self.device)
        dist.all_reduce(value)
        return int(value.item())

    def wait(self) -> None:
        """Wait for the others."""
        if self.count > 1:
            dist.barrier()

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process does the body alone, then the others: what it left on disk is there for them."""
        if not self.first:
            self.wait()
        try:
            yield
        finally:  # what fails the first fails the others with the same words, and nobody waits in vain
            if self.first:
                self.wait()


@contextmanager
def join_processes() -> Iterator[Processes]:
    """The processes that torchrun started (by its environment variables), else this one alone.

    CUDA devices talk by NCCL, one a process; processors by gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device=default_device())
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank=dist.get_rank(), count=dist.get_world_size(), device=device)
    finally:
        dist.destroy_process_group()
