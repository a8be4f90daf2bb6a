"""What is to be compared, and on what: a small YAML file, or built in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from clip_rd_edge.contract.shipped import shipped
from clip_rd_edge.contract.structs import read_yaml
from clip_rd_edge.contract.task import Task
from clip_rd_edge.data.tasks import load_task
from clip_rd_edge.errors import ConfigError, InputError, near_matches

Role = Literal["teacher", "baseline", "student", "exported", "quantised"]
_HUB = "hf-hub:"
_SHIPPED = "benchmarks/suites"


class SuiteRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model.

    Attributes:
        label: its name in the report.
        model: the folder of a bundle, a run or an open_clip model, or `hf-hub:ORG/REPO`.
        role: what it is compared with: a student with the teacher and the baseline (the same student, trained without
            a teacher), the exported one with the student, the quantised one with the exported one.
    """

    label: str
    model: str
    role: Role


class Suite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A comparison.

    Attributes:
        tasks: what `data.tasks.load_task` takes; reports take the first zero-shot one for headline, plot and samples.
        root: folder that models and tasks are in; None means where the command runs.
        threads: of every model. One by default: waiting thread pools of one runtime take cores from the next.
        rounds: how often each latency is timed, at most.
    """

    name: str
    rows: tuple[SuiteRow, ...]
    tasks: tuple[str, ...]
    root: str | None = None
    threads: int = 1
    rounds: int = 50

    def load_tasks(self) -> list[Task]:
        """Its tasks.

        Raises:
            InputError: one is unknown or empty.
        """
        return [
            load_task(str(self._below_root(name)) if self._below_root(name).is_dir() else name) for name in self.tasks
        ]

    def find(self, row: SuiteRow) -> str:
        """A row's model as `open_encoder` takes it.

        Raises:
            InputError: there is no such folder.
        """
        if row.model.startswith(_HUB):
            return row.model
        folder = self._below_root(row.model.removeprefix("local-dir:"))
        if not folder.is_dir():
            raise InputError(f"There is no model folder {folder}.")
        return str(folder)

    def _task(self, name: str) -> str:
        folder = self._below_root(name)
        return str(folder) if folder.is_dir() else name

    def _below_root(self, name: str) -> Path:
        return Path(self.root or ".") / name


def find_suite(name: str) -> Path:
    """A suite's file: itself, or a shipped one by its name.

    Raises:
        InputError: neither is there.
    """
    if Path(name).is_file():
        return Path(name)
    folder = shipped(_SHIPPED)
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise InputError(
            f"There is no suite {name!r}: neither a file nor one of {', '.join(known)}.{near_matches(name, known)}"
        )
    return folder / f"{name}.yaml"


def read_suite(path: Path) -> Suite:
    """Read a suite.

    Raises:
        InputError: there is no such file.
        ConfigError: it is no YAML, has an unknown key or a wrong type, or does not make sense.
    """
    suite = read_yaml(path, Suite)
    check_suite(suite, source=str(path))
    return suite


def check_suite(suite: Suite, *, source: str) -> None:
    """Refuse a suite that cannot be run.

    Raises:
        ConfigError: no rows or tasks, a label that stands twice, or a number below 1.
    """
    for name in ("rows", "tasks"):
        if not getattr(suite, name):
            raise ConfigError(f"{source} has no {name}; at least one is needed.")
    labels = [row.label for row in suite.rows]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ConfigError(f"{source} has the label {min(twice)!r} twice; rows are told apart by their labels.")
    for name in ("threads", "rounds"):
        if getattr(suite, name) < 1:
            raise ConfigError(f"{source}: {name} is {getattr(suite, name)}; at least 1 is needed.")
