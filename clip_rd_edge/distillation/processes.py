"""The processes of a run, a single one or those that torchrun started: how they share work, and how they stop.

A process that ends closes its connections, which the others notice at once. One that is stopped, or whose machine is
off, keeps them open: the others end TIMEOUT after it should have come to a step. Before the first step, and while the
main process evaluates, they wait for as long as that may take.

SIGINT, SIGTERM and SIGHUP stop a run between two steps with its state saved, and elsewhere at once. Job schedulers and
service managers send SIGTERM to every process of a job, so the loader's workers get it, too. They ignore it: the run
still needs them, and stops them itself when it ends.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined,unused-ignore]
from torch.nn.parallel import DistributedDataParallel

from clip_rd_edge.errors import ClipRdEdgeError, LostProcessError, first_line, relayed_error
from clip_rd_edge.models.clip import default_device
from clip_rd_edge.utils.process import handled_by, leave_lost_terminal, stop_signals

TIMEOUT = timedelta(minutes=10)  # of a message between processes that train
_LONGEST_WAIT = timedelta(days=7)  # for the main process: an index, a store of embeddings, an evaluation
_BUCKET_MB = 64  # of gradients per message
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's rank, the number of processes, and the device it computes on.

    In a single-process run the methods do not communicate.

    Attributes:
        control: a group over CPUs for waiting and counting, None for a single process. It has a longer timeout than the
            group that sums gradients, and no message of it waits for a GPU.
        hosts: the machine of each process, by rank; empty for a single process.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = None
    hosts: tuple[str, ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Concatenate the rows of all processes in rank order, without gradient, with one message for all tensors.

        Args:
            tensors: matrices with b rows each and one dtype; (b, D) becomes (world_size · b, D).
        """
        if self.world_size == 1:
            return list(tensors)
        rows = torch.cat(list(tensors), dim=1).contiguous()
        gathered = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(gathered, rows)
        widths = [tensor.shape[1] for tensor in tensors]
        return [part.contiguous() for part in torch.split(torch.cat(gathered), widths, dim=1)]

    def local_part(self, rows: Tensor) -> Tensor:
        """Return this process's rows of what `gather` returned."""
        size = len(rows) // self.world_size
        return rows[self.rank * size : (self.rank + 1) * size]

    def all_reduce(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace each tensor by its sum over processes, with one message per dtype; skips None."""
        if self.world_size > 1:
            _as_one_message([tensor for tensor in tensors if tensor is not None], dist.all_reduce)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the main process's, with one message per dtype.

        For running statistics of batch norms, as DistributedDataParallel does.
        """
        if self.world_size > 1:
            _as_one_message(list(tensors), partial(dist.broadcast, src=0))

    def synchronised(self, module: nn.Module) -> nn.Module:
        """Return a module whose backward pass sums the gradients over processes while it computes further ones.

        This is torch's DistributedDataParallel, but with sums, since each process has its share of one loss, and not a
        loss of its own. Parameters that the backward pass does not reach keep their gradients. For a single process,
        the module is returned.
        """
        if self.world_size == 1:
            return module
        buffers = [name for name, _ in module.named_buffers(remove_duplicate=False)]  # see `broadcast`
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
            module, buffers
        )
        # Of convolutions of 1 × 1 pixels, whose layout in memory has two equal descriptions.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        # With `find_unused_parameters`, buckets stay as they are after the first step. Their layout decides in which
        # order several processes' gradients are added up: a resumed run would otherwise differ in the last bits.
        parallel = DistributedDataParallel(module, find_unused_parameters=True, bucket_cap_mb=_BUCKET_MB)
        parallel.register_comm_hook(None, _sum_bucket)
        return parallel

    def accumulate(self, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the backward pass of a `synchronised` module keeps its gradients to itself."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return self.sum(int(flag))[0] > 0

    def sum(self, *local: int) -> list[int]:
        """Return the sum of each number over processes, with one message for all of them."""
        if self.world_size == 1:
            return list(local)
        values = torch.tensor(local)
        dist.all_reduce(values, group=self.control)
        return [int(value) for value in values.tolist()]

    def gather_objects(self, value: T) -> list[T]:
        """Return the value of each process, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def meet(self) -> None:
        """Wait for all processes, for TIMEOUT at most; the error of the first process names those that did not come."""
        if self.world_size > 1:
            dist.monitored_barrier(group=self.control, timeout=TIMEOUT, wait_all_ranks=True)

    def barrier(self) -> None:
        """Wait for all processes, however long."""
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def from_main(self, value: T) -> T:
        """Return the main process's value in all processes."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Call a function in the main process, and return its result in all; an error is raised as by `agree`."""
        value: T | None = None
        with self.together():
            if self.is_main:
                value = action()
        return self.from_main(cast(T, value))

    def agree(self, error: ClipRdEdgeError | None) -> None:
        """Raise an error in all processes if one has one: its own there, one that quotes it in the others."""
        failures = self.gather_objects(None if error is None else (str(error), error.advice, error.exit_code))
        for rank, failure in enumerate(failures):
            if failure is not None:
                message, hint, exit_code = failure
                message = f"Process {rank} of the run{self.where(rank)} cannot go on: {message}"
                raise error or relayed_error(message, hint=hint, exit_code=exit_code)

    def where(self, rank: int) -> str:
        """Return `, on HOST,` for a message about a process, or nothing if that is not known."""
        return f", on {self.hosts[rank]}," if self.hosts else ""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of this package in the body as `agree` does; the body sends no messages."""
        error: ClipRdEdgeError | None = None
        try:
            yield
        except ClipRdEdgeError as caught:
            error = caught
        self.agree(error)

    def main_first(self, action: Callable[[], T]) -> T:
        """Call a function in the main process, which shows its progress, and then in the others at once.

        They find on disk what was written; on a machine that does not share it, a lock has one of them write it. An
        error of this package in one process is raised in all.
        """
        value: T | None = None
        for is_turn in (self.is_main, not self.is_main):
            with self.together():
                value = action() if is_turn else value
        return cast(T, value)


def _as_one_message(tensors: Sequence[Tensor], communicate: Callable[[Tensor], object]) -> None:
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        communicate(flat)
        for tensor, part in zip(group, torch.split(flat, [tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


# torch compares annotations with its own type, which has no public name.
def _sum_bucket(_, bucket):  # type: ignore[no-untyped-def]
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT, **_store_after_restart())
    try:
        # Newer releases of torch declare a number for processes outside of the group, of which there are none.
        control: Any = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        hosts = [""] * world_size
        dist.all_gather_object(hosts, socket.gethostname(), group=control)
        yield Processes(rank, world_size, device, control, tuple(hosts))
    finally:
        dist.destroy_process_group()


def _store_after_restart() -> dict[str, Any]:
    """Return the arguments with which processes that torchrun has started again find each other, else none.

    Its store may still have the addresses of those that ended, for which the new ones would wait. On several machines,
    launchers may count restarts differently, so that torch's own ways have to do.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restart == "0" or not of_agent or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # libuv matters to the server alone, but PyTorch's wheel for Windows refuses it here, too.
    store: Any = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=TIMEOUT, use_libuv=False)
    store = PrefixStore(f"clip-rd-edge/restart-{restart}", store)
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


_MISSING = re.compile(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier|waiting for send/recv from rank (0)")


def lost_process(error: RuntimeError, processes: Processes) -> LostProcessError | None:
    """Return the error that names the processes without which a message failed; None for another error."""
    is_of_message = isinstance(error, dist.DistError) or any(
        text in str(error) for text in ("gloo", "Connection closed by peer", "monitoredBarrier")
    )
    if processes.world_size == 1 or not is_of_message:
        return None
    found = _MISSING.search(str(error))
    lost = [int(rank) for rank in (found[1] or found[2]).split(",")] if found else []
    if processes.world_size == 2:
        lost = [1 - processes.rank]
    hint = "its own output shows why; resume with the same command and {resume}"
    if not lost:
        return LostProcessError(f"The connection to another process of the run failed: {first_line(error)}.", hint=hint)
    names = " and ".join(f"{rank} (on {processes.hosts[rank]})" for rank in lost)
    return LostProcessError(f"Process {names} of the run has ended, or does not answer.", hint=hint)


def tell_failure(error: ClipRdEdgeError) -> None:
    """Let the other processes of the run end with the error of this one, which did not join them.

    They meet the error in `run_distillation`, where they would wait for this process.
    """
    with suppress(ClipRdEdgeError), join_processes() as processes:
        processes.agree(error)


class Stopped(BaseException):
    """A signal requested a stop while the run was waiting or evaluating, or outside of its steps."""


class StopRequest:
    """Whether a signal requested a stop: true once `signal_name` is set."""

    def __init__(self) -> None:
        self.signal_name = ""
        self._at_once = True

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block, a signal only sets the request: the code there must look at it."""
        with self._raising(False):
            yield

    def obey_no_more(self) -> None:
        """From now on, a signal only sets the request: the code ends for another reason, which it has yet to tell."""
        self._at_once = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block, a signal raises `Stopped`, also one that arrived before."""
        if self:
            raise Stopped
        with self._raising(True):
            yield

    @contextmanager
    def _raising(self, at_once: bool) -> Iterator[None]:
        previous, self._at_once = self._at_once, at_once
        try:
            yield
        finally:
            # Once raised, never again: what follows is saving the state.
            self._at_once = previous and not self

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        leave_lost_terminal()
        first, self.signal_name = not self, signal.Signals(number).name
        if first and self._at_once:
            self._at_once = False
            raise Stopped


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block, the first of the `stop_signals` sets the request; a second SIGINT interrupts at once."""
    request = StopRequest()
    with handled_by(request._handle, stop_signals()):
        yield request


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Within the block, this thread receives none of the `stop_signals`; processes started in it never do."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def obey_only_the_parent(parent: int) -> None:
    """End this process on SIGTERM from `parent` and ignore others'; for processes started with the signals blocked.

    `os.getppid` is not enough: from Python 3.14 on, a fork server stands between the two.

    The parent terminates a worker that does not end by itself, such as one that waits for a file system. One that stops
    while it takes a batch closes the connection to a thread of the worker, which does not report it.
    """
    sys.excepthook = _print_unless_connection_is_lost
    if sys.platform == "win32":  # which sends it to all processes of a console
        signal.signal(signal.SIGBREAK, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where such a worker ends when its read does
        threading.Thread(target=_end_when_terminated_by, args=(parent,), daemon=True).start()


def _print_unless_connection_is_lost(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)


def _end_when_terminated_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
