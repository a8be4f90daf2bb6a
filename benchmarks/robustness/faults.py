"""Fail the n-th write, fsync, rename, read, open or call of a socket of an operation, for n = 1, 2, 3 … until it ends.

    python -m benchmarks.robustness.faults -o benchmarks/results/MACHINE/faults.md  # half an hour
    python -m benchmarks.robustness.faults index benchmark  # what has one of these in its name

As SQLite's tests do. After each fault, nothing half-written may be taken for finished, what was there before must still
be right, and the next run must recover. `error` raises what the system reports (an I/O error, a full disk for a
write, a lost connection for a socket), after which the program cleans up. `kill` lets no further operation on files
succeed, as after `kill -9` or a power failure, so that nothing is cleaned up.

The operations are exporting a bundle over an older one, distill's checkpoints, indexing images, indexing shards,
reading shards from a web server, the answers and results of a benchmark, and whole runs of distill; models are tiny.
Exit code 1 if something was lost.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import io
import math
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np

from benchmarks.data.unreliable_server import UnreliableServer
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.utils.files import write_text

OPERATIONS = ("fsync", "rename", "read", "open", "write")
MODES = ("error", "kill")
SOCKET = "socket"  # connect, send or receive; its fault is always an error
_MAX_FAULTS = 2_000  # per scenario; more would mean that it never ends


class Killed(BaseException):
    """Stands for the end of the process."""


class Faults:
    """Counts operations on files below a folder, and fails the n-th of one kind.

    Files are opened by Python's own code on top of a raw file whose reads and writes are counted. What libraries in C++
    or Rust write on their own is not seen.

    Args:
        folder: where faults happen.
        operation: one of OPERATIONS, or SOCKET.
        number: n, from 1; 0 only counts.
        mode: `error` or `kill`.
        port: where sockets of this process must be connected for their calls to count; 0 counts none.
    """

    def __init__(self, folder: Path, operation: str, number: int, mode: str = "error", *, port: int = 0) -> None:
        self._folder, self._operation, self._number, self._mode = str(folder.resolve()), operation, number, mode
        self._port = port
        self.counts: Counter[str] = Counter()
        self.happened = False

    def count(self, operation: str, path: object) -> None:
        """Count an operation on a path, and raise an error if it is the one to fail."""
        if not isinstance(path, str | os.PathLike) or not str(Path(path).absolute()).startswith(self._folder):
            return
        if self.happened and self._mode == "kill":
            raise Killed
        self.counts[operation] += 1
        if operation == self._operation and self.counts[operation] == self._number:
            self.happened = True
            if self._mode == "kill":
                raise Killed
            code = errno.ENOSPC if operation == "write" else errno.EIO
            raise OSError(code, os.strerror(code), os.fspath(path))

    def count_call(self, port: int) -> None:
        """Count a call of a socket that is connected to a port, and raise an error if it is the one to fail."""
        if not self._port or port != self._port:
            return
        self.counts[SOCKET] += 1
        if self._operation == SOCKET and self.counts[SOCKET] == self._number:
            self.happened = True
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    @contextmanager
    def __call__(self) -> Iterator[Faults]:
        """Within the block, operations are counted and fail."""
        names = {"rename": "rename", "replace": "rename", "unlink": "remove", "rmdir": "remove", "mkdir": "mkdir"}
        opened: dict[int, object] = {}  # path by file descriptor

        def counted(function: Callable[..., Any], operation: str) -> Callable[..., Any]:
            def call(path: object, *arguments: Any, **options: Any) -> Any:
                self.count(operation, path)
                return function(path, *arguments, **options)

            return call

        real_open, real_close = os.open, os.close

        def counted_by_file(function: Callable[..., Any], operation: str) -> Callable[..., Any]:
            def call(file: int, *arguments: Any) -> Any:
                self.count(operation, opened.get(file))
                return function(file, *arguments)

            return call

        def os_open(path: Any, *arguments: Any, **options: Any) -> int:
            self.count("open", path)
            file = real_open(path, *arguments, **options)
            opened[file] = path
            return file

        def os_close(file: int) -> None:
            opened.pop(file, None)  # the next file may get the same number
            real_close(file)

        by_file = {"fsync": "fsync", "read": "read", "pread": "read", "write": "write"}
        patches = [patch.object(os, name, counted(getattr(os, name), operation)) for name, operation in names.items()]
        patches += [patch.object(os, "open", os_open), patch.object(os, "close", os_close)]
        for name, operation in by_file.items():
            patches.append(patch.object(os, name, counted_by_file(getattr(os, name), operation)))
        opener = _opener(self, opened, real_open)
        patches += [patch.object(builtins, "open", opener), patch.object(io, "open", opener)]
        patches += _socket_patches(self)
        for each in patches:
            each.start()
        try:
            yield self
        finally:
            for each in patches:
                each.stop()


def _socket_patches(faults: Faults) -> list[Any]:
    """Return stand-ins for the methods of sockets that connect, send and receive."""

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(socket.socket, name)

        def call(self: socket.socket, *arguments: Any) -> Any:
            port = 0
            with suppress(OSError, IndexError, TypeError):  # not connected, or to a path
                port = arguments[0][1] if name == "connect" else self.getpeername()[1]
            faults.count_call(port)
            return method(self, *arguments)

        return call

    names = ("connect", "send", "sendall", "sendmsg", "recv", "recv_into")
    return [patch.object(socket.socket, name, counted(name), create=True) for name in names]


def _opener(faults: Faults, opened: dict[int, object], real_open: Callable[..., int]) -> Callable[..., Any]:
    """Return a stand-in for `open` whose raw files count their operations."""
    real = io.open

    class Raw(io.FileIO):
        def __init__(self, file: Any, mode: str, closefd: bool, opener: Any) -> None:
            faults.count("open", file)
            super().__init__(file, mode, closefd, opener or (lambda path, flags: real_open(path, flags, 0o666)))
            opened[self.fileno()] = file

        def close(self) -> None:
            if not self.closed:
                opened.pop(self.fileno(), None)
            super().close()

        def write(self, content: Any) -> int:
            faults.count("write", self.name)
            return super().write(content)

        def read(self, size: int | None = -1) -> Any:
            faults.count("read", self.name)
            return super().read(size)

        def readinto(self, buffer: Any) -> Any:
            faults.count("read", self.name)
            return super().readinto(buffer)

        def readall(self) -> bytes:
            faults.count("read", self.name)
            return super().readall()

    def open_counted(  # the parameters of open
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not isinstance(file, str | os.PathLike):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = Raw(os.fspath(file), mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        if "+" in mode:
            buffered: Any = io.BufferedRandom(raw, size)
        else:
            buffered = io.BufferedReader(raw, size) if mode[0] == "r" else io.BufferedWriter(raw, size)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    return open_counted


class Scenario(Protocol):
    """An operation on a folder that is repeated with faults.

    `prepare` makes the folder as it is before; `run` is the operation, which is also the next run after a fault;
    `check` asserts that what is there is whole, old or new; `check_complete` that the operation has succeeded.
    """

    name: str
    port: int  # of the server that it asks, or 0

    def prepare(self, folder: Path) -> None: ...
    def run(self, folder: Path) -> None: ...
    def check(self, folder: Path) -> None: ...
    def check_complete(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How many faults a scenario took until it ended untouched, and what was wrong after them."""

    scenario: str
    operation: str
    mode: str
    faults: int
    reported: int  # faults that `run` reported; the others cost nothing, such as those of a cache
    problems: tuple[str, ...]
    ended: bool = True  # whether the scenario ended untouched in the time that there was


def until_untouched(scenario: Scenario, operation: str, mode: str, scratch: Path, *, end: float = math.inf) -> Outcome:
    """Fail the first, second, third … operation of a kind, each time in a new folder, until a time of the clock."""
    problems: list[str] = []
    reported = 0
    for number in range(1, _MAX_FAULTS):
        if time.monotonic() > end:
            return Outcome(scenario.name, operation, mode, number - 1, reported, tuple(problems), ended=False)
        folder = scratch / "place"
        folder.mkdir()
        try:
            scenario.prepare(folder)
            faults = Faults(folder, operation, number, mode, port=scenario.port)
            with faults():
                try:
                    scenario.run(folder)
                except (OSError, ClipRdEdgeError, RuntimeError, Killed):
                    reported += 1
            if not faults.happened:
                return Outcome(scenario.name, operation, mode, number - 1, reported, tuple(problems))
            stage = "after the fault"
            try:
                scenario.check(folder)
                stage = "in the next run"
                scenario.run(folder)
                scenario.check_complete(folder)
            except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
                problems.append(f"{operation} {number}, {stage}: {type(error).__name__}: {error}")
        finally:
            shutil.rmtree(folder)
    raise RuntimeError(f"{scenario.name} does not end untouched after {_MAX_FAULTS} faults.")


class BundleScenario:
    """Finish a bundle and put it in the place of an older one, as export does.

    The towers are copied from a finished bundle rather than exported from torch, which takes seconds.
    """

    name = "export over an older bundle"
    port = 0

    def __init__(self, bundle: Path) -> None:
        from clip_rd_edge.bundle.manifest import read_manifest

        self._manifest = read_manifest(bundle)
        names = {self._manifest.image.file, self._manifest.text.file, "tokenizer.json"}
        self._files = {name: (bundle / name).read_bytes() for name in names}

    def prepare(self, folder: Path) -> None:
        self._write(folder, "old")

    def run(self, folder: Path) -> None:
        self._write(folder, "new")

    def _write(self, folder: Path, name: str) -> None:
        import msgspec

        from clip_rd_edge.bundle.manifest import write_manifest
        from clip_rd_edge.utils.files import write_bytes
        from clip_rd_edge.utils.outputs import new_folder

        with new_folder(folder / "bundle") as temporary:
            for file, content in self._files.items():
                write_bytes(temporary / file, content)
            write_manifest(temporary, msgspec.structs.replace(self._manifest, name=name))

    def check(self, folder: Path) -> None:
        if (folder / "bundle").exists():
            assert self._name(folder / "bundle") in ("old", "new")
            return
        # Killed between the two renames: the old one is still there under its other name.
        (aside,) = folder.glob(".bundle.*.old")
        assert self._name(aside) == "old"

    def check_complete(self, folder: Path) -> None:
        assert self._name(folder / "bundle") == "new"

    @staticmethod
    def _name(bundle: Path) -> str:
        from clip_rd_edge.bundle.manifest import damaged_files, manifest_is_intact, read_manifest

        manifest = read_manifest(bundle)
        assert manifest_is_intact(bundle, manifest)
        assert damaged_files(bundle, manifest) == []
        return manifest.name


class CheckpointScenario:
    """Save the third checkpoint of a run."""

    name = "distill: a checkpoint"
    port = 0

    def prepare(self, folder: Path) -> None:
        for step in (1, 2):
            self._save(folder, step)

    def run(self, folder: Path) -> None:
        from clip_rd_edge.utils.outputs import remove_leftovers

        remove_leftovers(folder / "checkpoints")  # as each start does
        self._save(folder, 3)

    def check(self, folder: Path) -> None:
        assert self._load(folder) in (2, 3)

    def check_complete(self, folder: Path) -> None:
        assert self._load(folder) == 3
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-2", "step-3"]

    @staticmethod
    def _module(step: int) -> Any:
        import torch

        module = torch.nn.Linear(4, 4)
        with torch.no_grad():
            module.weight.fill_(step)
        return module

    def _save(self, folder: Path, step: int) -> None:
        from clip_rd_edge.distillation.checkpoint import save_checkpoint

        save_checkpoint(folder, step, {"model": self._module(step)})

    def _load(self, folder: Path) -> int:
        from clip_rd_edge.distillation.checkpoint import load_checkpoint
        from clip_rd_edge.distillation.processes import Processes

        module = self._module(0)
        step = load_checkpoint(folder, {"model": module}, Processes())
        assert (module.weight == step).all(), "the weights are not those of the step"
        return step


class IndexScenario:
    """Update the index of a folder in which images were added."""

    name = "index"
    port = 0

    def __init__(self, bundle: Path) -> None:
        from clip_rd_edge.runtime.load import load

        self._encoder = load(bundle, threads=1)

    def prepare(self, folder: Path) -> None:
        self._draw(folder, range(2))
        self.run(folder)
        self._draw(folder, range(2, 4))

    def run(self, folder: Path) -> None:
        from clip_rd_edge.runtime.index_update import update_index

        update_index(self._encoder, folder / "images", folder / "index")

    def check(self, folder: Path) -> None:
        # An image that could not be read is reported, and tried again by the next update.
        assert {"0.png", "1.png"} <= self._right_entries(folder) <= {f"{i}.png" for i in range(4)}

    def check_complete(self, folder: Path) -> None:
        assert len(self._right_entries(folder)) == 4
        assert len(list((folder / "index").iterdir())) == 2  # nothing is left over

    def _right_entries(self, folder: Path) -> set[str]:
        from clip_rd_edge.bundle.images import open_image
        from clip_rd_edge.runtime.index import read_index

        index, rows = read_index(folder / "index")
        for entry, row in zip(index.entries, rows, strict=True):
            expected = self._encoder.encode_images([open_image(folder / "images" / entry.path)])[0]
            np.testing.assert_allclose(row, expected, atol=1e-5)
        return {entry.path for entry in index.entries}

    @staticmethod
    def _draw(folder: Path, numbers: range) -> None:
        from PIL import Image

        (folder / "images").mkdir(exist_ok=True)
        for number in numbers:
            colour = (60 * number, 255 - 60 * number, 30)
            Image.new("RGB", (12 + number, 9), colour).save(folder / "images" / f"{number}.png")


@contextmanager
def _indexing_here(folder: Path) -> Iterator[None]:
    """Within the block, the cache is in the folder, where operations fail."""
    with patch.dict(os.environ, {"CLIP_RD_EDGE_CACHE": str(folder / "cache")}):
        yield


class ShardScenario:
    """Index two shards and read their pairs; a cache that cannot be written only costs time."""

    name = "index of shards"
    port = 0

    def prepare(self, folder: Path) -> None:
        import tarfile

        from PIL import Image

        for shard in range(2):
            with tarfile.open(folder / f"{shard}.tar", "w") as archive:
                for number in range(2):
                    buffer = io.BytesIO()
                    Image.new("RGB", (8, 8), (100 * shard, 100 * number, 0)).save(buffer, "PNG")
                    for suffix, content in (("png", buffer.getvalue()), ("txt", f"{shard} {number}".encode())):
                        info = tarfile.TarInfo(f"{number}.{suffix}")
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))

    def run(self, folder: Path) -> None:
        self._captions(folder)

    def check(self, folder: Path) -> None:
        self.check_complete(folder)

    def check_complete(self, folder: Path) -> None:
        assert self._captions(folder) == ["0 0", "0 1", "1 0", "1 1"]

    @staticmethod
    def _captions(folder: Path) -> list[str]:
        from clip_rd_edge.data.load import load_pairs

        with _indexing_here(folder):
            pairs = load_pairs(f"{folder}/{{0..1}}.tar")
            captions = [pairs.read(i).captions[0] for i in range(len(pairs))]
            assert not pairs.problems.count
        return captions


class RemoteScenario:
    """Read shards from a web server; a connection that is lost is made again."""

    name = "shards of a web server"

    def __init__(self, server: UnreliableServer) -> None:
        self._server, self.port = server, server.server_port

    def prepare(self, folder: Path) -> None:
        from clip_rd_edge.data import remote

        served = folder.with_name("served")  # where the server's own operations do not fail
        if not served.exists():
            served.mkdir()
            ShardScenario().prepare(served)
            self._server.folder = served
        remote._known_versions.clear()

    def run(self, folder: Path) -> None:
        self._pairs(folder)

    def check(self, folder: Path) -> None:
        self.check_complete(folder)

    def check_complete(self, folder: Path) -> None:
        assert self._pairs(folder) == [
            (f"{shard} {number}", (100 * shard, 100 * number, 0)) for shard in range(2) for number in range(2)
        ]

    def _pairs(self, folder: Path) -> list[tuple[str, Any]]:
        from clip_rd_edge.data import remote
        from clip_rd_edge.data.load import load_pairs

        with _indexing_here(folder), patch.object(remote, "_RETRY_DELAYS_S", (0.0,) * 3):
            pairs = load_pairs(f"{self._server.url}/{{0..1}}.tar")
            assert not pairs.problems.count
            samples = map(pairs.read, range(len(pairs)))
            return [(sample.captions[0], sample.image().getpixel((0, 0))) for sample in samples]


class BenchmarkScenario:
    """Store a model's answers, and write the results of a benchmark over older ones."""

    name = "benchmark: answers and results"
    port = 0

    def prepare(self, folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_bytes(b"weights")

    def run(self, folder: Path) -> None:
        cache, task, answers = self._parts(folder)
        model = str(folder / "model")
        if cache.find(model, None, task) is None:
            cache.store(model, None, task, answers)

    def check(self, folder: Path) -> None:
        cache, task, answers = self._parts(folder)
        assert cache.find(str(folder / "model"), None, task) in (None, answers)

    def check_complete(self, folder: Path) -> None:
        cache, task, answers = self._parts(folder)
        assert cache.find(str(folder / "model"), None, task) == answers

    @staticmethod
    def _parts(folder: Path) -> tuple[Any, Any, Any]:
        from clip_rd_edge.benchmarking.accuracy import ZeroShotPredictions
        from clip_rd_edge.benchmarking.metrics import Interval, ZeroShotScore
        from clip_rd_edge.benchmarking.results import Environment
        from clip_rd_edge.benchmarking.run import PredictionCache
        from clip_rd_edge.data.tasks import ZeroShotTask

        score = ZeroShotScore(
            task="t", images=1, classes=2, top1=1.0, top1_interval=Interval(0.0, 1.0), top5=None, mean_per_class=1.0,
            templates="{}", calibration_error=0.0,
        )  # fmt: skip
        environment = Environment(
            machine="m", instruction_sets=(), memory_bytes=0, system="s", python="3", packages={}, date="", commit="",
            accelerator="",
        )  # fmt: skip
        task = ZeroShotTask(name="t", images=(Path("a.png"),), targets=(0,), labels=("a", "b"))
        answers = ZeroShotPredictions(score=score, labels=(0,), probabilities=(0.75,))
        return PredictionCache(folder / "parts", environment), task, answers


class DistillScenario:
    """A whole run of distill of four steps, with two checkpoints, that is resumed after each fault."""

    name = "distill: a run"
    port = 0

    def __init__(self) -> None:
        self._expected: dict[str, Any] = {}

    def run_untouched(self, folder: Path) -> None:
        """Run without faults, for the weights that all others must end with."""
        folder.mkdir()
        self.prepare(folder)
        self.run(folder)
        self.check_complete(folder)

    def prepare(self, folder: Path) -> None:
        from PIL import Image

        lines = ["filepath,title"]
        for number in range(4):
            Image.new("RGB", (40, 40), (60 * number, 99, 255 - 60 * number)).save(folder / f"{number}.png")
            lines.append(f"{folder / f'{number}.png'},colour {number}")
        (folder / "pairs.csv").write_text("\n".join(lines) + "\n")

    def run(self, folder: Path) -> None:
        import msgspec

        from clip_rd_edge.distillation import run as running
        from clip_rd_edge.distillation.config import RunConfig, load_recipe

        recipe = msgspec.structs.replace(
            load_recipe("clip"), steps=4, batch_size=2, precision="fp32", learning_rate=1e-3
        )
        config = RunConfig(
            recipe_name="clip", recipe=recipe, data=str(folder / "pairs.csv"), student="test_convnext", image_size=32,
            text="64x1", context_length=8, embedding_size=8, checkpoint_every=2, log_every=1, workers=0,
        )  # fmt: skip
        with patch.object(running, "plot_run", lambda *_: None):
            running.run_distillation(config, folder / "run", resume=True)

    def check(self, folder: Path) -> None:
        if (folder / "run" / "student").exists():
            self.check_complete(folder)

    def check_complete(self, folder: Path) -> None:
        from safetensors.numpy import load_file

        weights = load_file(folder / "run" / "student" / "open_clip_model.safetensors")
        if not self._expected:
            self._expected = weights
        assert weights.keys() == self._expected.keys()
        assert all(np.array_equal(weights[name], self._expected[name]) for name in weights), "other weights"


def make_bundle(folder: Path) -> Path:
    """Export a tiny student with random weights as a float32 bundle."""
    import torch

    from clip_rd_edge.exporting.bundle import export_bundle
    from clip_rd_edge.exporting.plan import Plan
    from clip_rd_edge.models.students import build_student, student_config

    torch.manual_seed(0)
    config = student_config("resnet10t", embedding_size=16, image_size=32, text="64x1", context_length=8)
    export_bundle(build_student(config, name="tiny"), folder / "bundle", Plan())
    return folder / "bundle"


def scenarios(bundle: Path) -> list[Scenario]:
    """Return the scenarios that take seconds."""
    return [BundleScenario(bundle), CheckpointScenario(), IndexScenario(bundle), ShardScenario(), BenchmarkScenario()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="also write the table into this file")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further fault after this time")
    parser.add_argument("names", nargs="*", help="words of the operations; all by default")
    parser.add_argument("--without-runs", action="store_true", help="leave out whole runs of distill, the longest part")
    options = parser.parse_args()
    rows, lost = [["operation", "failing", "as", "faults", "reported", "losses"]], 0
    total, end = 0, time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as name, UnreliableServer().running() as server:
        scratch = Path(name).resolve()
        tested = [*scenarios(make_bundle(scratch)), RemoteScenario(server)]
        if not options.without_runs:
            tested.append(DistillScenario())
        if options.names:
            tested = [scenario for scenario in tested if any(word in scenario.name for word in options.names)]
        for scenario in tested:
            if isinstance(scenario, DistillScenario):
                scenario.run_untouched(scratch / "reference")
            kinds = [(operation, mode) for operation in OPERATIONS for mode in MODES]
            for operation, mode in [*kinds, (SOCKET, "error")] if scenario.port else kinds:
                outcome = until_untouched(scenario, operation, mode, scratch, end=end)
                faults = f"{outcome.faults}" if outcome.ended else f"{outcome.faults}, not to the end"
                figures = (faults, str(outcome.reported), str(len(outcome.problems)))
                total += outcome.faults
                rows.append([scenario.name, operation, mode, *figures])
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
                print(*outcome.problems, sep="\n", end="\n" * bool(outcome.problems), file=sys.stderr, flush=True)
                lost += len(outcome.problems)
    text = f"{total:,} faults, {lost} losses ({date.today().isoformat()}).\n\n{markdown_table(rows, left=(0, 1, 2))}\n"
    print(text)
    if options.output:
        write_text(options.output, text)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
