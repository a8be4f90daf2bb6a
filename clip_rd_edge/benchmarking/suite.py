"""Benchmark suites: which models are compared on which tasks, as a small YAML file or built in Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from clip_rd_edge.bundle.formats import Runtime
from clip_rd_edge.bundle.runs import LOCAL_DIR
from clip_rd_edge.data.folders import SPLITS
from clip_rd_edge.data.load import SEPARATOR, local_place, names_shards
from clip_rd_edge.data.tasks import BUILT_IN_TASKS, Task, load_task, with_distinct_names
from clip_rd_edge.data.webdataset import parse_sources
from clip_rd_edge.errors import ConfigError, InputError, near_matches, quoted
from clip_rd_edge.models.names import parse_name
from clip_rd_edge.runtime.encoder import MAX_THREADS
from clip_rd_edge.utils.paths import Typed, exists, is_file, is_folder, shipped_path, typed
from clip_rd_edge.utils.structs import CheckedStruct, PositiveFloat, PositiveInt, Share, commented_yaml, read_yaml

Role = Literal["teacher", "baseline", "student", "exported", "quantised"]
RowRuntime = Literal["torch", Runtime]
Threads = Annotated[int, Meta(ge=1, le=MAX_THREADS)]
_SHIPPED = "benchmarks/suites"


class SuiteRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of a suite.

    Attributes:
        label: its name in the report.
        model: the folder of a bundle, a run or an open_clip model, `hf-hub:ORG/REPO`, or `NAME@TAG`.
        role: decides what it is compared with: a student with the teacher and the baseline (the same student, trained
            without a teacher), the exported model with the student, the quantised one with the exported one.
        runtime: torch for a model, one of the others for a bundle; None means torch, or the runtime that the bundle was
            exported for.
    """

    label: str
    model: str
    role: Role
    runtime: RowRuntime | None = None


class Suite(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A comparison of models on tasks.

    Attributes:
        name: as shown in the report.
        rows: the models, each with a label, a model, a role (teacher, baseline, student, exported or quantised) and, if
            it is not the usual one, a runtime.
        tasks: what to evaluate on, as for `clip-rd-edge evaluate --task`; headline, plot and samples of the report use
            the first zero-shot task.
        root: folder that contains models and tasks; null means the current directory.
        data_root: folder that contains the tasks, if it is a different one.
        missing_tasks: what to do if a task's data set is not found: `error` or `skip`.
        threads: number of threads of every model. Default 1, because idle thread pools of one runtime take CPU time
            from the next.
        rounds: max number of times each latency is measured.
        shots: also measure the accuracy after `teach` with 1, 2, 4, … and at most so many images of each label.
        budget_ms, min_accuracy: requirements of the report's recommendation: max p95 latency from image file to answer
            in milliseconds, and min top-1 as a fraction.
    """

    name: str
    rows: tuple[SuiteRow, ...]
    tasks: tuple[str, ...]
    root: str | None = None
    data_root: str | None = None
    missing_tasks: Literal["error", "skip"] = "error"
    threads: Threads = 1
    rounds: PositiveInt = 50
    shots: Annotated[int, Meta(ge=0, le=256)] = 0
    budget_ms: PositiveFloat | None = None
    min_accuracy: Share | None = None

    def load_tasks(self) -> list[Task]:
        missing = self.missing()
        if len(missing) == len(set(self.tasks)):
            raise InputError(
                f"None of the {len(missing)} tasks of the suite {self.name} is in {self._data_root}: "
                f"{', '.join(missing)}.",
                hint="name the folder that contains your copies of the data sets: {root}",
            )
        names = [name for name in dict.fromkeys(self.tasks) if name not in missing]
        return with_distinct_names([load_task(self._resolve_task(name)) for name in names], names)

    def missing(self) -> dict[str, str]:
        """Return the tasks to skip because their data sets were not found, with the reason."""
        if self.missing_tasks == "error":
            return {}
        missing = {
            name: f"{self._data_root} has no folder {name}, under any of the names {', '.join(folder_names(name))}."
            for name in self.tasks
            if self._resolve_task(name) == name and name not in BUILT_IN_TASKS and not exists(name)
        }
        shards = {name: _missing_shard(self._resolve_task(name)) for name in self.tasks if names_shards(name)}
        return {name: reason for name, reason in {**missing, **shards}.items() if reason}

    def resolve_model(self, row: SuiteRow) -> Typed:
        named = parse_name(row.model)
        if named.kind == "hub" or (named.kind == "open_clip" and named.weights and not exists(named.weights)):
            return Typed(row.model)  # published: a file of weights is not for a suite to name
        folder = Path(self.root or ".") / row.model.removeprefix(LOCAL_DIR)
        if not is_folder(folder):
            raise InputError(f"There is no model folder {folder}.")
        return typed(folder)

    @property
    def _data_root(self) -> Path:
        return Path(self.data_root or self.root or ".")

    def _resolve_task(self, name: str) -> Typed:
        """Return the task's path below the data root if it exists, else its name."""
        named = local_place(name, source=f"The suite {self.name}")
        if names_shards(name):
            below = Typed(SEPARATOR.join(str(self._data_root / part) for part in name.split(SEPARATOR)))
            return below if _missing_shard(named) else named if _missing_shard(below) else below
        candidates = (self._data_root / folder for folder in folder_names(name))
        return next((typed(path) for path in candidates if exists(path)), named)


def folder_names(task: str) -> tuple[str, ...]:
    """Return the possible file names of a task: CLIP_benchmark's name, its export folder, or the last part alone.

    `vtab/cifar10` is also found as `wds_vtab-cifar10`, `vtab-cifar10`, `wds_cifar10` and `cifar10`. An absolute path,
    or a split such as `flowers/test`, is not found under its last part: that could be another data set's.
    """
    task = task.rstrip("/") or task
    dashed, last = task.replace("/", "-"), task.rpartition("/")[2]
    folders: tuple[str, ...] = (task, f"wds_{dashed}", dashed, f"wds_{last}", last)
    if Path(task).is_absolute() or last in (*SPLITS, ""):
        folders = (task,)
    return tuple(dict.fromkeys((*folders, f"{task}.csv", f"{task}.tsv")))


def shipped_suites(key: str = "rows") -> list[str]:
    """Return the names of the shipped suites of a kind, sorted; `key` as for `find_suite`."""
    kind = re.compile(rf"^{key}:", re.MULTILINE)
    suites = shipped_path(_SHIPPED).glob("*.yaml")
    return sorted(path.stem for path in suites if kind.search(path.read_text(encoding="utf-8")))


def find_suite(name: str, *, key: str = "rows") -> Path:
    """Return a suite's file: `name` itself if it is a file, else the shipped suite of that name.

    Args:
        key: what suites of this kind have; the error names those alone.
    """
    if is_file(name):
        return Path(name)
    folder = shipped_path(_SHIPPED)
    path = folder / f"{name}.yaml"
    if path not in folder.glob("*.yaml"):
        known = shipped_suites(key)
        raise InputError(
            f"There is no suite {quoted(name)}: neither a file nor one of {', '.join(known)}."
            f"{near_matches(name, known)}",
            hint="check the path, or write a suite, starting from the output of: clip-rd-edge benchmark --init",
        )
    return path


def read_suite(path: Path, *, rows: Sequence[SuiteRow] = (), data_root: str | None = None) -> Suite:
    """Read a suite.

    Args:
        rows: models to use instead of the file's; their paths are relative to the current directory, not to the suite's
            root.
        data_root: folder of the tasks to use instead of the file's.
    """
    suite = read_yaml(path, Suite)
    data_root = data_root or suite.data_root or suite.root
    if rows:
        suite = msgspec.structs.replace(suite, rows=tuple(rows), root=None)
    suite = msgspec.structs.replace(suite, data_root=data_root)
    check_suite(suite, source=str(path))
    return suite


def check_suite(suite: Suite, *, source: str) -> None:
    """Check that a suite can be run."""
    labels = [row.label for row in suite.rows]
    wrong = [f"no {name}" for name in ("rows", "tasks") if not getattr(suite, name)]
    wrong += [f"the label {label!r} twice" for label in labels if labels.count(label) > 1]
    if wrong:
        raise ConfigError(
            f"{source} has {wrong[0]}; expected tasks, and rows with a label each of its own.",
            hint="" if labels else "name some: {models} student=runs/first {models} quantised=bundle",
        )


EXAMPLE = Suite(
    name="my-suite",
    rows=(
        SuiteRow(label="Teacher", model=f"{LOCAL_DIR}teacher", role="teacher"),
        SuiteRow(label="Student", model="runs/first", role="student"),
        SuiteRow(label="ONNX FP32", model="bundles/fp32", role="exported"),
        SuiteRow(label="ONNX INT8", model="bundles/int8", role="quantised"),
    ),
    tasks=("my-images/",),
)


def commented_suite() -> str:
    """Return an example of a suite with all its keys as commented YAML."""
    return f"# Measure it with: clip-rd-edge benchmark COPY.yaml -o RESULTS\n\n{commented_yaml(EXAMPLE)}"


def parse_models(models: Sequence[str]) -> tuple[SuiteRow, ...]:
    """Parse rows from `ROLE=MODEL`.

    Labels are the roles, with the model's name if several models have the same role, and its path if those have the
    same name.
    """
    items = [model.partition("=") for model in models]
    roles = [role for role, _, _ in items]
    names = [(role, _last_part(model)) for role, _, model in items]
    rows = []
    for role, _, model in items:
        if role not in get_args(Role) or not model:
            raise ConfigError(
                f"The model {role + '=' + model if model else role!r} is not ROLE=MODEL with one of the roles "
                f"{', '.join(get_args(Role))}.{near_matches(role, get_args(Role))}",
                hint="pass {models} ROLE=MODEL, such as {models} student=runs/first",
            )
        name = _last_part(model)
        shown = model.rstrip("/") if names.count((role, name)) > 1 else name
        label = f"{role.capitalize()} {shown}" if roles.count(role) > 1 else role.capitalize()
        rows.append(SuiteRow(label=label, model=model, role=role))  # type: ignore[arg-type]  # one of the roles
    return tuple(rows)


def _last_part(model: str) -> str:
    return Path(model).name  # with either slash on Windows


def _missing_shard(name: Typed) -> str:
    """Return which local shard does not exist, in a sentence; empty if all do."""
    try:
        parse_sources(name)
    except InputError as error:
        return str(error)
    return ""
