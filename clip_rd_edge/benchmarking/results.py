"""What a suite gave, as one file that every report is made from."""

from __future__ import annotations

from pathlib import Path

import msgspec

from clip_rd_edge.benchmarking.environment import Environment
from clip_rd_edge.benchmarking.latency import Latency
from clip_rd_edge.benchmarking.scores import Interval, Score
from clip_rd_edge.benchmarking.suite import Role, Suite
from clip_rd_edge.contract.encoder import Description
from clip_rd_edge.contract.files import write_bytes
from clip_rd_edge.contract.structs import read_json, to_json
from clip_rd_edge.errors import ConfigError

FORMAT_VERSION = 1
RESULTS = "results.json"


class RowResult(msgspec.Struct, frozen=True, kw_only=True):
    """One model: what it is, its score on each task of the suite in the suite's order, and its latency."""

    label: str
    role: Role
    model: str
    description: Description
    scores: tuple[Score, ...]
    latency: Latency


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


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """results.json."""

    suite: Suite
    environment: Environment
    rows: tuple[RowResult, ...]
    skipped: tuple[SkippedRow, ...] = ()
    missing: tuple[MissingTask, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    samples: tuple[Sample, ...] = ()
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
    found = read_json(path, _Version).format_version
    if found > FORMAT_VERSION:
        raise ConfigError(
            f"{path} has format version {found}; this clip-rd-edge reads up to {FORMAT_VERSION}.",
            hint="pip install -U clip-rd-edge",
        )
    results = read_json(path, Results)
    if not results.rows:
        raise ConfigError(f"{path} has no rows; expected one a measured model.", hint="run the benchmark again")
    return results


class _Version(msgspec.Struct):
    format_version: int
