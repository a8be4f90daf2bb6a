"""What is to be compared, and on what: a small YAML file, or built in Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec

from clip_rd_edge.contract.task import Task
from clip_rd_edge.data.clip_benchmark import Fallback, neutral
from clip_rd_edge.data.tasks import EMBEDDED, load_task
from clip_rd_edge.errors import ConfigError, InputError, near_matches
from clip_rd_edge.utils.io import read_yaml, shipped

Role = Literal["teacher", "baseline", "student", "exported", "quantised"]
RowRuntime = Literal["torch", "torch-compile", "onnxruntime", "openvino", "tensorrt"]
_HUB = "hf-hub:"
_SHIPPED = "benchmarks/suites"


class SuiteRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model.

    Attributes:
        label: its name in the report.
        model: the folder of a bundle, a run or an open_clip model, or `hf-hub:ORG/REPO`.
        role: what it is compared with: a student with the teacher and the baseline (the same student, trained without
            a teacher), the exported one with the student, the quantised one with the exported one.
        runtime: what runs it: torch or torch-compile for a model, one of the others for a bundle; None takes eager
            torch, or what the bundle was exported for.
    """

    label: str
    model: str
    role: Role
    runtime: RowRuntime | None = None


class Suite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A comparison.

    Attributes:
        tasks: what `data.tasks.load_task` takes; reports take the first zero-shot one for headline, plot and samples.
        root: folder that models and tasks are in; None means where the command runs.
        data_root: folder that tasks are in, where it is another.
        missing_tasks: what to do where a task's data set is not there.
        threads: of every model. One by default: waiting thread pools of one runtime take cores from the next.
        rounds: how often each latency is timed, at most.
        budget_ms, min_accuracy: what the report's recommendation is for: milliseconds from a picture's file to its
            answer, in 95 of 100 pictures, and top-1 as a fraction.
    """

    name: str
    rows: tuple[SuiteRow, ...]
    tasks: tuple[str, ...]
    root: str | None = None
    data_root: str | None = None
    missing_tasks: Literal["error", "skip"] = "error"
    threads: int = 1
    rounds: int = 50
    budget_ms: float | None = None
    min_accuracy: float | None = None

    def load_tasks(self, fallback: Fallback = neutral) -> list[Task]:
        """Its tasks, without those that `missing` names.

        Raises:
            InputError: one is unknown or empty, or all are missing.
        """
        missing = self.missing()
        if len(missing) == len(self.tasks):
            raise InputError(
                f"None of the {len(missing)} tasks of the suite {self.name} is in {self._data_root}: "
                f"{', '.join(missing)}.",
                hint="name the folder that your copies of the data sets are in: --root",
            )
        return [load_task(self._task(name), fallback=fallback) for name in self.tasks if name not in missing]

    def missing(self) -> dict[str, str]:
        """Tasks to skip because their data sets are not there, with the reason."""
        if self.missing_tasks == "error":
            return {}
        return {
            name: f"{self._data_root} has no folder {name}, under none of the names {', '.join(spellings(name))}."
            for name in self.tasks
            if self._task(name) == name and name not in EMBEDDED and not Path(name).exists()
        }

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

    @property
    def _data_root(self) -> Path:
        return Path(self.data_root or self.root or ".")

    def _task(self, name: str) -> str:
        """Where the task lies below the root, else its name."""
        found = (self._data_root / spelling for spelling in spellings(name))
        return next((str(path) for path in found if path.exists()), name)

    def _below_root(self, name: str) -> Path:
        return Path(self.root or ".") / name


def spellings(task: str) -> tuple[str, ...]:
    """Names that a task's folder or table may have: as CLIP_benchmark calls it, exports it, or its last part alone.

    `vtab/cifar10` is also found as `wds_vtab-cifar10`, `vtab-cifar10`, `wds_cifar10` and `cifar10`.
    """
    dashed, last = task.replace("/", "-"), task.rpartition("/")[2]
    folders = (task, f"wds_{dashed}", dashed, f"wds_{last}", last)
    return tuple(dict.fromkeys((*folders, f"{task}.csv", f"{task}.tsv")))


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


def read_suite(path: Path, *, rows: Sequence[SuiteRow] = (), data_root: str | None = None) -> Suite:
    """Read a suite.

    Args:
        rows: models instead of the file's; they are where the command runs, not below the suite's root.
        data_root: folder that tasks are in instead of the file's.

    Raises:
        InputError: there is no such file.
        ConfigError: it is no YAML, has an unknown key or a wrong type, or does not make sense.
    """
    try:
        suite = read_yaml(path, Suite)
    except ConfigError as error:
        hint = "benchmark takes rows of models, and tasks; methods are compared by clip-rd-edge evidence run"
        raise ConfigError(str(error), hint=hint) from error
    data_root = data_root or suite.data_root or suite.root
    if rows:
        suite = msgspec.structs.replace(suite, rows=tuple(rows), root=None)
    suite = msgspec.structs.replace(suite, data_root=data_root)
    check_suite(suite, source=str(path))
    return suite


def check_suite(suite: Suite, *, source: str) -> None:
    """Refuse a suite that cannot be run.

    Raises:
        ConfigError: no rows or tasks, a label that stands twice, or a number below 1.
    """
    for name in ("rows", "tasks"):
        if not getattr(suite, name):
            hint = "name some: --model student=runs/first --model quantised=bundle" if name == "rows" else ""
            raise ConfigError(f"{source} has no {name}; at least one is needed.", hint=hint)
    labels = [row.label for row in suite.rows]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ConfigError(f"{source} has the label {min(twice)!r} twice; rows are told apart by their labels.")
    for name in ("threads", "rounds"):
        if getattr(suite, name) < 1:
            raise ConfigError(f"{source}: {name} is {getattr(suite, name)}; at least 1 is needed.")


def parse_models(models: Sequence[str]) -> tuple[SuiteRow, ...]:
    """Rows from `ROLE=MODEL`, labelled by their roles, and by their models' names where a role has several.

    Raises:
        ConfigError: one has no such form, or no such role.
    """
    parts = [model.partition("=") for model in models]
    roles = [role for role, _, _ in parts]
    rows = []
    for role, _, model in parts:
        if role not in get_args(Role) or not model:
            raise ConfigError(
                f"The model {role + '=' + model if model else role!r} is not ROLE=MODEL with one of the roles "
                f"{', '.join(get_args(Role))}.{near_matches(role, get_args(Role))}"
            )
        several = roles.count(role) > 1
        label = f"{role.capitalize()} {model.rstrip('/').rpartition('/')[2]}" if several else role.capitalize()
        rows.append(SuiteRow(label=label, model=model, role=role))  # type: ignore[arg-type]  # one of the roles
    return tuple(rows)
