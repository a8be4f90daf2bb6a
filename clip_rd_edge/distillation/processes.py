"""The processes of a run, a single one or those that torchrun started: how they share work, and how they stop."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined,unused-ignore]
from torch.nn.parallel import DistributedDataParallel

from clip_rd_edge.errors import ClipRdEdgeError, LostProcessError, UsageError, first_line, relayed_error
from clip_rd_edge.models.clip import default_device
from clip_rd_edge.utils.host import is_running
from clip_rd_edge.utils.process import handled_by, leave_lost_terminal, stop_signals

# Indexing, caching and evaluating may take hours, in which the other processes wait for the main one. A process that
# ends closes its connections, which the others notice at once; see `heartbeat` for one that is stopped.
_LONGEST_WAIT = timedelta(days=7)
_CONNECTION_S = 1800.0  # until all have started, as torch's own
_BUCKET_MB = 64  # of gradients per message
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's rank, the number of processes, and the device it computes on.

    In a single-process run the methods do not communicate.

    Attributes:
        control: a group over CPUs for waiting and counting, None for a single process. It has a longer timeout than the
            group that sums gradients, and no message of it waits for a GPU.
        members: machine and number of each process, by rank; empty for a single process.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = None
    members: tuple[Member, ...] = ()

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

    def barrier(self) -> None:
        """Wait for all processes."""
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
        return f", on {self.members[rank].host}," if self.members else ""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of this package in the body as `agree` does; the body sends no messages."""
        error: ClipRdEdgeError | None = None
        try:
            yield
        except ClipRdEdgeError as caught:
            error = caught
        self.agree(error)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body in the main process first, then in one process of each further machine, then in the others.

        The later ones find on disk what was written, whether or not the machines share their files. An error of this
        package in one process is raised in all.
        """
        hosts = [member.host for member in self.members]
        is_first_here = not hosts or hosts.index(hosts[self.rank]) == self.rank
        turn = 0 if self.is_main else 1 if is_first_here else 2
        for _ in range(turn):
            self.barrier()
        with self.together():
            try:
                yield
            finally:  # whatever happened: the others must not wait forever
                for _ in range(2 - turn):
                    self.barrier()


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


def require_one_process(what: str, *, hint: str) -> None:
    """Refuse several processes where there are several runs: the processes of torchrun join each other only once.

    Args:
        what: is done by one process, such as `Teachers are ranked`.
    """
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UsageError(f"{what} by a single process, but {count} were started.", hint=hint)


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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **_store_after_restart())
    try:
        # Newer releases of torch declare a number for processes outside of the group, of which there are none.
        control: Any = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        members: list[Member] = [this_member()] * world_size
        dist.all_gather_object(members, this_member(), group=control)
        with heartbeat(rank, world_size):
            yield Processes(rank, world_size, device, control, tuple(members))
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
    store = PrefixStore(f"clip-rd-edge/restart-{restart}", cast(Any, open_store(_CONNECTION_S)))
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


def tell_failure(error: ClipRdEdgeError) -> None:
    """Tell the other processes of the run that this one ends with an error before it joined them.

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

    What `os.getppid` says is not enough: from Python 3.14 on, a fork server stands between the two.

    The parent terminates a worker that does not end by itself, such as one that waits for a file system. One that stops
    while it takes a batch closes the connection to a thread of the worker, which says nothing about it.
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


INTERVAL_S = 2.0
# A process counts its own ticks rather than seconds: while it is stopped itself, it does not miss others.
MAX_MISSED = 30
_LEFT = 1 << 40  # added to the number of a process that has ended as it should


class Store(Protocol):
    """Numbers that all processes share."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which is 0 at first; return the sum."""
        ...


def open_store(timeout_s: float) -> Store:
    """Connect to the store that torchrun provides.

    The connection is one of our own: torch's wait for others, and one that waits lets no other thread ask.
    """
    store: Store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        use_libuv=False,  # matters to the server alone, but PyTorch's wheel for Windows refuses it here, too
    )
    return store


def store_key(purpose: str, rank: int) -> str:
    """Return the key of a process's number, another one after each restart by torchrun."""
    return f"clip-rd-edge/{purpose}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


class Heartbeat:
    """Beats for one process, and watches the one after it.

    Args:
        rank, world_size: of this process.
        store: the shared numbers.
        holder: rank of the process that holds them, or None if none of the run's does. It is held silent when the store
            does not answer.
        on_silence: called once, in another thread, with the rank of a process that has been silent for MAX_MISSED
            intervals.
        interval_s: between two beats.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store,
        *,
        holder: int | None,
        on_silence: Callable[[int], None],
        interval_s: float,
    ) -> None:
        self._rank, self._watched = rank, (rank + 1) % world_size
        self._store, self._holder, self._on_silence, self._interval_s = store, holder, on_silence, interval_s
        self._stopping = threading.Event()
        self._round, self._seen = 0, 0  # beats of this process that the store has taken, and the watched one's number
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._watching = threading.Thread(target=self._watch, name="heartbeat-watch", daemon=True)

    def start(self) -> None:
        """Start to beat and to watch."""
        self._beating.start()
        self._watching.start()

    def stop(self) -> None:
        """Stop; the process that watches this one takes no notice."""
        self._stopping.set()
        for thread in (self._watching, self._beating):
            thread.join(timeout=2 * self._interval_s)

    def _beat(self) -> None:
        try:
            while not self._stopping.is_set():
                self._store.add(_key(self._rank), 1)
                self._seen = self._store.add(_key(self._watched), 0)
                self._round += 1
                self._stopping.wait(self._interval_s)
            self._store.add(_key(self._rank), _LEFT)
        except RuntimeError:  # the store is gone, and with it the launcher or the first process: connections tell
            self._stopping.set()

    def _watch(self) -> None:
        missed, seen, round_then = 0, 0, 0
        while not self._stopping.wait(self._interval_s):
            round_now, seen_now = self._round, self._seen
            if seen_now >= _LEFT:
                return
            if seen_now != seen:
                missed, seen, round_then = 0, seen_now, round_now
                continue
            missed += 1
            if missed > MAX_MISSED:
                # Since then, and not in the last interval alone, in which a busy machine may be late with a beat. The
                # first one may have been on its way when the store fell silent.
                answers = round_now - round_then > 1
                silent = self._watched if answers else self._holder
                if silent is not None:
                    self._on_silence(silent)
                return


def _key(rank: int) -> str:
    return store_key("beats", rank)


@contextmanager
def heartbeat(rank: int, world_size: int) -> Iterator[None]:
    """Within the block, this process ends with exit code 1 if another one of the run is stopped."""
    store = open_store(INTERVAL_S * MAX_MISSED)
    holder = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
    beats = Heartbeat(rank, world_size, store, holder=holder, on_silence=_end, interval_s=INTERVAL_S)
    beats.start()
    try:
        yield
    finally:
        beats.stop()


def silence_error(rank: int) -> ClipRdEdgeError:
    """Return the error that names a process that is silent."""
    return ClipRdEdgeError(
        f"Process {rank} of the run has not answered for {INTERVAL_S * MAX_MISSED:.0f} s: it is stopped, or its "
        "machine is.",
        hint="end it, and resume with the same command and {resume}",
    )


def _end(rank: int) -> None:
    """End this process: its main thread waits for the silent one, inside of a library that nothing else can wake."""
    error = silence_error(rank)
    sys.stderr.write(f"error: {error}\nhint: {error.hint}\n")
    sys.stderr.flush()
    os._exit(error.exit_code)


_POLL_S = 0.2
LOCAL_WAIT_S = 2.0  # until the launcher has noticed that a process ended
REMOTE_WAIT_S = 10.0
RESUME_HINT = "its own output says why; resume with the same command and {resume}"


class Member(NamedTuple):
    """A process of a run, by its machine and its number there."""

    host: str
    pid: int


def this_member() -> Member:
    """Return this process."""
    return Member(socket.gethostname(), os.getpid())


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether an error is that of a message between processes, rather than of a computation."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def find_lost(rank: int, members: Sequence[Member], store: Store | None) -> list[int]:
    """Return the ranks of the processes that have ended, empty if that cannot be told.

    Those on this machine are looked for by their numbers. Those on others had a message fail, too, and answer a roll
    call unless they are lost themselves. Without a store to answer in, the only one on another machine is lost: the
    launcher that had the store ends with its processes.

    Args:
        members: all processes, by rank.
        store: None if it is gone.
    """
    store = store if store is not None and _answer(store, _roll_key(rank)) else None
    here = [other for other, member in enumerate(members) if member.host == members[rank].host]
    deadline = time.monotonic() + LOCAL_WAIT_S
    while time.monotonic() < deadline:
        if ended := [other for other in here if is_running(members[other].pid) is False]:
            return ended
        time.sleep(_POLL_S)
    elsewhere = [other for other in range(len(members)) if other not in here]
    deadline = time.monotonic() + REMOTE_WAIT_S
    while store and elsewhere and time.monotonic() < deadline:
        try:
            elsewhere = [other for other in elsewhere if not store.add(_roll_key(other), 0)]
        except RuntimeError:  # it ended with its machine
            store = None
        time.sleep(_POLL_S)
    return elsewhere if store or len(elsewhere) == 1 else []


def lost_error(error: RuntimeError, rank: int, members: Sequence[Member]) -> LostProcessError:
    """Return the error that names the processes that are lost."""
    lost = find_lost(rank, members, _connect())
    own = members[rank].host
    if not lost:
        hosts = dict.fromkeys(member.host for member in members if member.host != own)
        return LostProcessError(
            f"The connection to another process of the run failed: {first_line(error)}.",
            hint=f"see the output on {' and '.join(hosts) or own}; resume with the same command and {{resume}}",
        )
    names = " and ".join(f"{other} (on {members[other].host})" for other in lost)
    verb = "has ended" if len(lost) == 1 else "have ended"
    if any(members[other].host != own for other in lost):
        verb += " or cannot be reached"
    return LostProcessError(f"Process {names} of the run {verb}.", hint=RESUME_HINT)


def _connect() -> Store | None:
    try:
        return open_store(REMOTE_WAIT_S)
    except (RuntimeError, KeyError):
        return None


def _answer(store: Store, key: str) -> bool:
    try:
        store.add(key, 1)
    except RuntimeError:
        return False
    return True


def _roll_key(rank: int) -> str:
    return store_key("roll-call", rank)
