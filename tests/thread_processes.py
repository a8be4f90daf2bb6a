"""Processes of a run as threads of one process, for tests."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from clip_rd_edge.distillation import processes as module
from clip_rd_edge.distillation.processes import Processes, Stopped, join_processes, lost_process
from clip_rd_edge.distillation.step import StepSettings
from clip_rd_edge.distillation.store import QueueBank
from clip_rd_edge.errors import ClipRdEdgeError


@dataclass
class Exchange:
    """What the threads of a group share."""

    count: int
    barrier: threading.Barrier = field(init=False)
    values: list[Any] = field(init=False)
    accumulating: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.accumulating = [False] * self.count
        self.barrier, self.values = threading.Barrier(self.count, timeout=60), [None] * self.count

    def all(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class Threads(Processes):
    """Processes that are threads of this one."""

    exchange: Exchange = field(default_factory=lambda: Exchange(1))

    def gather_objects(self, value: Any) -> list[Any]:
        return self.exchange.all(self.rank, value)

    def from_main(self, value: Any) -> Any:
        return self.exchange.all(self.rank, value)[0]

    def meet(self) -> None:
        self.exchange.barrier.wait()

    def barrier(self) -> None:
        self.exchange.barrier.wait()

    def sum(self, *local: int) -> list[int]:
        return [sum(numbers) for numbers in zip(*self.exchange.all(self.rank, local), strict=True)]

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(parts) for parts in zip(*self.exchange.all(self.rank, tensors), strict=True)]

    def all_reduce(self, tensors: Iterable[Tensor | None]) -> None:
        present = [tensor for tensor in tensors if tensor is not None]
        everyone = self.exchange.all(self.rank, [tensor.clone() for tensor in present])
        for tensor, parts in zip(present, zip(*everyone, strict=True), strict=True):
            tensor.copy_(torch.stack(parts).sum(dim=0))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """All start from the same buffers."""

    def synchronised(self, module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(self._sum)
        return module

    def _sum(self, parameter: Tensor) -> None:
        if not self.exchange.accumulating[self.rank]:
            self.all_reduce([parameter.grad])

    @contextmanager
    def accumulate(self, module: nn.Module) -> Iterator[None]:
        self.exchange.accumulating[self.rank] = True
        yield
        self.exchange.accumulating[self.rank] = False


def call_in_threads(count: int, action: Callable[[Threads], Any], *, hosts: str = "") -> list[Any]:
    """Call a function in each process; return its results, or what it raised.

    Args:
        hosts: one letter per process, the name of its machine; empty if that is not known.
    """
    exchange = Exchange(count)

    def call(rank: int) -> Any:
        try:
            return action(Threads(rank=rank, world_size=count, hosts=tuple(hosts), exchange=exchange))
        except (ClipRdEdgeError, Stopped) as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


def fork_server() -> Any:
    """Return what starts processes as copies of one that has imported the libraries, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["open_clip", "timm", "pytest", "clip_rd_edge.distillation.step", "clip_rd_edge.cli.main"]
    )
    return context


def start_two(action: Callable[..., str], *arguments: object) -> list[tuple[Any, Any]]:
    """Start the two real processes of a run; each sends what a function returns, or the traceback of what it raises."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in "01":
        receiver, sender = fork_server().Pipe(duplex=False)
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
        process = fork_server().Process(target=_send, args=(sender, own, action, *arguments), daemon=True)
        process.start()
        sender.close()
        started.append((process, receiver))
    return started


def _send(sender: Any, variables: Mapping[str, str], action: Callable[..., str], *arguments: object) -> None:
    os.environ.update(variables)
    try:
        sender.send(action(*arguments))
    except Exception:  # noqa: BLE001 - whatever it is, the test shows it
        sender.send(traceback.format_exc())


def learn_as_one(tests: str) -> str:
    """Compute steps of `test_processes.py` by the processes of a run, and compare them with those of one."""
    own = runpy.run_path(tests)
    expected = own["compute"](own["make_step"](Processes(), StepSettings()))
    with join_processes() as processes:
        for settings in (StepSettings(), StepSettings(chunks=2, block=3)):
            step = own["make_step"](processes, settings)
            for _ in range(2):
                step.bank = QueueBank(12, torch.device("cpu"))
                for parameter in [*step.student.model.parameters(), *step.objective.parameters()]:
                    parameter.grad = None
                own["assert_close"](own["compute"](step), expected)
    return ""


def lose_the_second(how: str) -> str:
    """Send the second process of a run a signal once they have met; return how the first names the loss."""
    module.TIMEOUT = timedelta(seconds=3)
    with join_processes() as processes:
        processes.meet()
        try:
            if processes.rank == 1:
                os.kill(os.getpid(), signal.Signals[how])
            processes.meet()
        except RuntimeError as error:
            return str(lost_process(error, processes))
    return "nothing is lost"
