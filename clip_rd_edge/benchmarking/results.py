"""What a suite gave, as one file that every report is made from."""

from __future__ import annotations

from pathlib import Path

import msgspec

from clip_rd_edge.benchmarking.answers import Marks
from clip_rd_edge.benchmarking.cold import ColdStart
from clip_rd_edge.benchmarking.environment import Environment
from clip_rd_edge.benchmarking.latency import Latency, Reference
from clip_rd_edge.benchmarking.load import Throughput
from clip_rd_edge.benchmarking.scores import Interval, Score
from clip_rd_edge.benchmarking.suite import Role, Suite
from clip_rd_edge.contract.encoder import Description
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.utils.io import read_versioned_json, to_json, write_bytes

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
    pictures: int
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
