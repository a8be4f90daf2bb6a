"""The result file of a benchmark, with the environment that it was measured in."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from clip_rd_edge.benchmarking.accuracy import Correctness, Sample
from clip_rd_edge.benchmarking.latency import ColdStart, Latency, ReferenceLatency, Throughput
from clip_rd_edge.benchmarking.metrics import ClassScore, Interval, Score, may_be_chance
from clip_rd_edge.benchmarking.suite import Role, Suite
from clip_rd_edge.bundle.encoder import Description
from clip_rd_edge.errors import with_hint, without_checkout
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.host import (
    ONNXRUNTIMES,
    installed_versions,
    instruction_sets,
    machine_name,
    memory_bytes,
    nvidia_gpus,
    system_name,
)
from clip_rd_edge.utils.paths import is_file, is_folder
from clip_rd_edge.utils.structs import read_versioned_json, to_json
from clip_rd_edge.utils.text import as_unicode, each_text, shown_sources

PACKAGES = (
    "clip-rd-edge", *ONNXRUNTIMES, "openvino", "ai-edge-litert", "executorch", "coremltools", "torch",
    "open_clip_torch", "timm", "numpy", "pillow", "tokenizers",
)  # fmt: skip


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """The hardware and software of a measurement.

    Attributes:
        machine: processor and number of cores.
        instruction_sets: those relevant to low-precision arithmetic; empty if unknown.
        memory_bytes: memory of the whole machine; 0 if unknown.
        packages: versions of the installed packages among PACKAGES.
        date: UTC, in ISO 8601.
        commit: commit of the source checkout that the code ran from, or empty.
        accelerator: names of the NVIDIA GPUs; empty without any.
    """

    machine: str
    instruction_sets: tuple[str, ...]
    memory_bytes: int
    system: str
    python: str
    packages: dict[str, str]
    date: str
    commit: str
    accelerator: str


def this_environment() -> Environment:
    """Return the environment of the current process."""
    return Environment(
        machine=machine_name(),
        instruction_sets=instruction_sets(),
        memory_bytes=memory_bytes(),
        system=system_name(),
        python=platform.python_version(),
        packages=installed_versions(PACKAGES),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=_commit(),
        accelerator=nvidia_gpus(),
    )


def _commit() -> str:
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # an installed package may be inside an unrelated repository
        return ""
    try:
        command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


FORMAT_VERSION = 3
RESULTS = "results.json"
T = TypeVar("T", Suite, "Results")


class RowResult(msgspec.Struct, frozen=True, kw_only=True):
    """All measurements of one model.

    Attributes:
        scores: one per task, in the suite's order.
        throughput: images per second at each batch size.
        cold_start: time to the first answer and peak memory of a new process; None if it was not measured.
        correctness: which examples were right.
    """

    label: str
    role: Role
    model: str
    description: Description
    scores: tuple[Score, ...]
    latency: Latency
    throughput: tuple[Throughput, ...]
    cold_start: ColdStart | None
    correctness: tuple[Correctness, ...]


class SkippedRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row that could not be measured, the reason, and what to do about it, which may be empty."""

    label: str
    model: str
    reason: str
    hint: str = ""

    def __str__(self) -> str:
        return with_hint(self.reason, self.hint)


class MissingTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task of the suite whose data set was not found, and where it was looked for."""

    name: str
    reason: str


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Top-1 of a row minus that of a reference row on one task, on the same images.

    Attributes:
        interval: 95 % confidence interval, by paired bootstrap over images.
        p_value: by the exact sign test, two-sided.
    """

    task: str
    label: str
    reference: str
    difference: float
    interval: Interval
    p_value: float

    @property
    def may_be_chance(self) -> bool:
        """See `metrics.may_be_chance`."""
        return may_be_chance(self.interval, self.p_value)


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """Content of results.json.

    Attributes:
        reference: latency of the reference workload.
        other_load: fraction of the machine's CPU time used by other processes while latencies were timed.
        weakest: the classes of the last row with the lowest recall on the first zero-shot task.
        verdict: sentences that a report begins with, of `build`.
    """

    suite: Suite
    environment: Environment
    rows: Annotated[tuple[RowResult, ...], msgspec.Meta(min_length=1)]
    reference: ReferenceLatency
    other_load: float | None = None
    skipped: tuple[SkippedRow, ...] = ()
    missing: tuple[MissingTask, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    samples: tuple[Sample, ...] = ()
    weakest: tuple[ClassScore, ...] = ()
    verdict: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    def first(self, role: Role) -> RowResult | None:
        """Return the first row with this role, or None."""
        return next((row for row in self.rows if row.role == role), None)

    def last(self, role: Role) -> RowResult | None:
        """Return the last row with this role, or None."""
        return next((row for row in reversed(self.rows) if row.role == role), None)


def published(value: T) -> T:
    """Return results or a suite as others may read them: without the package's folder, and secrets in addresses.

    What is not Unicode in a path becomes escapes, which every file can hold.
    """
    plain = msgspec.to_builtins(value, builtin_types=(bytes,))  # bytes are no text
    suite = plain.get("suite", plain)
    suite["tasks"] = shown_sources(suite["tasks"])
    plain = each_text(each_text(plain, without_checkout()), as_unicode)
    return msgspec.convert(plain, type(value), builtin_types=(bytes,))


def write_results(path: Path, results: Results) -> None:
    """Write results.json atomically."""
    write_bytes(path, to_json(results))


def is_results(path: Path) -> bool:
    """Return whether `path` is a results.json, or the folder of one."""
    return is_file(path / RESULTS) or (path.suffix == ".json" and is_file(path))


def read_results(path: Path) -> Results:
    """Read results.json, given by its path or by the folder that a benchmark wrote."""
    path = path / RESULTS if is_folder(path) else path
    hint = "expected the results of a benchmark; those of an evidence suite are for clip-rd-edge evidence report"
    return read_versioned_json(path, Results, newest=FORMAT_VERSION, hint=hint)
