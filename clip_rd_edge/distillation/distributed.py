"""The processes of a run: a single one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.models.clip import default_device


@dataclass(frozen=True)
class Processes:
    """This process's rank, the number of processes, and the device it computes on.

    In a single-process run the methods do not communicate.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate the rows of all processes in rank order, (b, D) to (world_size · b, D), without gradient."""
        if self.world_size == 1:
            return rows
        gathered = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    def local_part(self, rows: Tensor) -> Tensor:
        """Return this process's rows of what `gather` returned."""
        size = len(rows) // self.world_size
        return rows[self.rank * size : (self.rank + 1) * size]

    def all_reduce(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace each tensor by its sum over processes, with one message per dtype; skips None."""
        if self.world_size == 1:
            return
        present = [tensor for tensor in tensors if tensor is not None]
        for dtype in dict.fromkeys(tensor.dtype for tensor in present):
            group = [tensor for tensor in present if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            for tensor, part in zip(group, torch.split(flat, [tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the main process's; for running statistics of batch norms, as DDP does."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def sum(self, local: int) -> int:
        """Return the sum of a number over processes."""
        if self.world_size == 1:
            return local
        value = torch.tensor(local, device=self.device)
        dist.all_reduce(value)
        return int(value.item())

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def on_main(self, action: Callable[[], None]) -> None:
        """Call a function in the main process; if it raises an error of this package, all processes raise one."""
        error: ClipRdEdgeError | None = None
        if self.is_main:
            try:
                action()
            except ClipRdEdgeError as caught:
                error = caught
        if self.any(error is not None):
            raise error or ClipRdEdgeError("The main process cannot go on; its message says why.")

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body in the main process first, then in the others, which find on disk what it wrote."""
        if not self.is_main:
            self.barrier()
        try:
            yield
        finally:  # on failure too: the others then fail with the same message instead of waiting forever
            if self.is_main:
                self.barrier()


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started (known by its environment variables), or run as a single process.

    Uses NCCL with one CUDA device per process, or gloo on CPUs.
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
        yield Processes(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)
    finally:
        dist.destroy_process_group()
