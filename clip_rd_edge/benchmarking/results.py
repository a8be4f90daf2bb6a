"""What a measurement was made on, as data: latencies mean nothing without it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from clip_rd_edge.benchmarking.accuracy import Marks
from clip_rd_edge.benchmarking.latency import Latency, Reference
from clip_rd_edge.benchmarking.metrics import Interval, Score
from clip_rd_edge.benchmarking.suite import Role, Suite
from clip_rd_edge.benchmarking.throughput import ColdStart, Throughput
from clip_rd_edge.contract.encoder import Description
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.utils.host import instruction_sets, machine_name, memory_bytes, system_name
from clip_rd_edge.utils.io import read_versioned_json, to_json, write_bytes

PACKAGES = (
    "clip-rd-edge",
    "onnxruntime",
    "openvino",
    "nncf",
    "torch",
    "open_clip_torch",
    "timm",
    "numpy",
    "pillow",
    "tokenizers",
)


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """The machine and the software of a measurement.

    Attributes:
        machine: processor and cores.
        instruction_sets: those that matter for small numbers; empty where the system does not tell.
        memory_bytes: of the whole machine, 0 where the system does not tell.
        packages: versions of what is installed of PACKAGES.
        date: UTC, as ISO 8601.
        commit: of the checkout that the code ran from, or empty.
    """

    machine: str
    instruction_sets: tuple[str, ...]
    memory_bytes: int
    system: str
    python: str
    packages: dict[str, str]
    date: str
    commit: str


def this_environment() -> Environment:
    """The environment of this process, now."""
    return Environment(
        machine=machine_name(),
        instruction_sets=instruction_sets(),
        memory_bytes=memory_bytes(),
        system=system_name(),
        python=platform.python_version(),
        packages=installed_versions(PACKAGES),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=_commit(),
    )


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    # From the metadata: importing torch to ask for its version takes seconds, and a device has none.
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # an installed package may lie below somebody else's repository
        return ""
    try:
        command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


FORMAT_VERSION = 2
RESULTS = "results.json"


class RowResult(msgspec.Struct, frozen=True, kw_only=True):
    """One model: what it is, its score on each task of the suite in the suite's order, and its latency.

    Attributes:
        throughput: pictures a second by batch.
        cold_start: time to the first answer and peak memory of a new process; None where none was started.
        energy_joules: a picture in the image tower, of the whole processor; None where the machine does not tell.
        marks: which questions it answered rightly.

    Results of format version 1 have none of the last four.
    """

    label: str
    role: Role
    model: str
    description: Description
    scores: tuple[Score, ...]
    latency: Latency
    throughput: tuple[Throughput, ...] = ()
    cold_start: ColdStart | None = None
    energy_joules: float | None = None
    marks: tuple[Marks, ...] = ()


class SkippedRow(msgspec.Struct, frozen=True, kw_only=True):
    """One that could not be measured, and why."""

    label: str
    model: str
    reason: str


class MissingTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task of the suite whose data set is not here, and where it was looked for."""

    name: str
    reason: str


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Top-1 of a row minus that of its reference on one task, on the same pictures.

    Attributes:
        interval: 95 %, by bootstrap over pictures, paired.
    """

    task: str
    label: str
    reference: str
    difference: float
    interval: Interval


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a row said to a picture, how sure it was, and whether it was right."""

    row: str
    label: str
    probability: float
    right: bool


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """A picture (a small PNG), its label, and what models said to it."""

    task: str
    png: bytes
    label: str
    answers: tuple[Answer, ...]


class WorstClass(msgspec.Struct, frozen=True, kw_only=True):
    """A class that a row gets wrong most.

    Attributes:
        right: of its `pictures`.
        png: a picture of it that was taken for another.
        taken_for: what it was taken for most.
        taken_for_png: a picture of that, or empty where the task has none.
    """

    row: str
    task: str
    label: str
    right: int
    images: int
    png: bytes
    taken_for: str
    taken_for_png: bytes


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """results.json.

    Attributes:
        reference: what the machine's own pace was; None in results of format version 1.
        other_load: part of the machine's time that other processes took while latencies were timed.
    """

    suite: Suite
    environment: Environment
    rows: tuple[RowResult, ...]
    reference: Reference | None = None
    other_load: float | None = None
    skipped: tuple[SkippedRow, ...] = ()
    missing: tuple[MissingTask, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    samples: tuple[Sample, ...] = ()
    worst: tuple[WorstClass, ...] = ()
    format_version: int = FORMAT_VERSION

    def first(self, *roles: Role) -> RowResult | None:
        """The first row of the first of these roles that has one."""
        return next((row for role in roles for row in self.rows if row.role == role), None)


def write_results(path: Path, results: Results) -> None:
    """Write results.json, whole or not at all."""
    write_bytes(path, to_json(results))


def read_results(path: Path) -> Results:
    """Read results.json.

    Raises:
        InputError: there is no such file.
        ConfigError: it is damaged, of a newer format, or has no rows.
    """
    results = read_versioned_json(path, Results, newest=FORMAT_VERSION)
    if not results.rows:
        raise ConfigError(f"{path} has no rows; expected one a measured model.", hint="run the benchmark again")
    return results
