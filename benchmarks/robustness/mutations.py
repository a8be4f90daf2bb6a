"""Do the tests notice deliberate faults? Each is applied to a copy of the package, one at a time.

    python -m benchmarks.robustness.mutations -o benchmarks/results/MACHINE/mutations.md   # all of them: an hour or so
    python -m benchmarks.robustness.mutations runtime web                                  # those of two packages

The faults are in benchmarks/mutations.yaml. A fault counts as noticed if the named tests pass without it and fail with
it, or take more than fifteen minutes. Beside the table, a file with the suffix .json has each verdict as soon as it is
known: the same command goes on after an interruption, and repeats only the faults that went unnoticed or that were
changed since. Exit code 1 if one goes unnoticed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest

from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.utils.files import write_bytes, write_text
from clip_rd_edge.utils.host import machine_name
from clip_rd_edge.utils.structs import read_json, read_yaml, to_json

ROOT = Path(__file__).parents[2]
COPIED = ("clip_rd_edge", "tests", "benchmarks", "export", "docs", "pyproject.toml", "README.md")
TIMEOUT_S = 900.0  # of one run of pytest; a fault can make a loop endless
_TOO_SLOW = -1_000


class Mutation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A deliberate fault.

    Attributes:
        fault: what it is, for the table.
        old, new: text that occurs exactly once in `file`, and what replaces it.
        tests: arguments of pytest: the tests that should notice it.
    """

    fault: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def key(self) -> str:
        """What a verdict belongs to: another text or other tests need a verdict of their own."""
        return hashlib.sha256("\0".join((self.file, self.old, self.new, self.tests)).encode()).hexdigest()[:16]


class Outcome(msgspec.Struct, frozen=True):
    """Whether the tests pass without the fault and fail with it, and how long the latter took in seconds."""

    passes_without: bool
    fails_with: bool
    seconds: float

    @property
    def verdict(self) -> str:
        """One word for the table."""
        if not self.passes_without:
            return "**the tests fail without it**"
        return "noticed" if self.fails_with else "**unnoticed**"


class Verdicts(msgspec.Struct, frozen=True):
    """What is known so far, by the key of each fault."""

    machine: str
    outcomes: dict[str, Outcome]


def read_mutations() -> dict[str, list[Mutation]]:
    """Return the faults of benchmarks/mutations.yaml by area."""
    return read_yaml(ROOT / "benchmarks" / "mutations.yaml", dict[str, list[Mutation]])


def run_tests(copy: Path, tests: str) -> bool:
    """Run fast tests in a copy; return whether there are some and all pass in time.

    They run in a fork of this process, which has imported what takes seconds to import. One that a signal ends, as when
    memory is short, is run again.
    """
    for _ in range(2):
        with tempfile.TemporaryFile() as output:
            process = os.fork()
            if process == 0:
                _run_in_fork(copy, tests, output.fileno())
            code = _wait(process)
            if code > 1:
                output.seek(0)
                text = output.read().decode(errors="replace")
                raise SystemExit(f"pytest {tests} ended with exit code {code}:\n{text[-2000:]}")
        if code >= 0 or code == _TOO_SLOW:
            break
    return code == 0


def _run_in_fork(copy: Path, tests: str, output: int) -> NoReturn:
    code = 70
    try:
        os.setsid()  # a group of its own, so that the processes that a test starts end with it
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
        os.environ.update(PYTHONPATH=str(copy), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        os.chdir(copy)
        sys.dont_write_bytecode = True
        for name in [name for name in sys.modules if name.partition(".")[0] in ("clip_rd_edge", "benchmarks")]:
            del sys.modules[name]
        sys.path[:] = [str(copy), *(path for path in sys.path if path != str(ROOT))]
        importlib.invalidate_caches()
        # Folders of its own: those that pytest takes otherwise are removed by other runs of pytest on this machine.
        options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "--basetemp", str(copy / "pytest")]
        code = int(pytest.main([*options, *shlex.split(tests)]))
    except BaseException:  # noqa: BLE001  the fork must end here, whatever happens
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(process: int) -> int:
    """Return the exit code of a fork, minus the signal that ended it, or _TOO_SLOW after ending it."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)  # what its tests have left
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return _TOO_SLOW


def import_what_tests_need() -> None:
    """Import other packages than this one once, rather than for each run of the tests."""
    for name in (
        "numpy",
        "onnx",
        "onnxruntime",
        "PIL.Image",
        "torch",
        "torchvision",
        "open_clip",
        "timm",
        "transformers",
    ):
        with suppress(ImportError):
            importlib.import_module(name)


def apply(mutation: Mutation, copy: Path) -> None:
    """Put a fault into a copy of the package."""
    path = copy / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.fault}: {mutation.old!r} occurs {text.count(mutation.old)} times in {path}.")
    path.write_text(text.replace(mutation.old, mutation.new))


def check(mutation: Mutation, copy: Path, passing: dict[str, bool]) -> Outcome:
    """Run a mutation's tests without and with it; leave the copy as it was."""
    if mutation.tests not in passing:
        passing[mutation.tests] = run_tests(copy, mutation.tests)
    path = copy / mutation.file
    original = path.read_text()
    apply(mutation, copy)
    started = time.perf_counter()
    try:
        fails = not run_tests(copy, mutation.tests)
    finally:
        path.write_text(original)
    return Outcome(passing[mutation.tests], fails, time.perf_counter() - started)


def read_verdicts(path: Path | None) -> dict[str, Outcome]:
    """Return the verdicts of an earlier run that need not be repeated, by key."""
    if path is None or not path.exists():
        return {}
    outcomes = read_json(path, Verdicts).outcomes
    return {key: outcome for key, outcome in outcomes.items() if outcome.verdict == "noticed"}


def check_all(mutations: list[Mutation], saved: Path | None) -> dict[str, Outcome]:
    """Return a verdict for each mutation, those of an earlier run included; save each one as soon as it is known."""
    outcomes, passing = read_verdicts(saved), dict[str, bool]()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
        for mutation in mutations:
            if mutation.key in outcomes:
                continue
            outcome = outcomes[mutation.key] = check(mutation, copy, passing)
            print(f"{outcome.verdict}: {mutation.fault} ({outcome.seconds:.0f} s)", file=sys.stderr, flush=True)
            if saved is not None:
                write_bytes(saved, to_json(Verdicts(machine_name(), outcomes)))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", help="all by default")
    parser.add_argument(
        "-o", "--output", type=Path, help="also write the table into this file, and the verdicts beside it"
    )
    parser.add_argument("--table", action="store_true", help="only write the table of the verdicts that are there")
    options = parser.parse_args()
    areas = read_mutations()
    mutations = [(area, mutation) for area in options.areas or areas for mutation in areas[area]]
    saved = options.output.with_suffix(".json") if options.output else None
    if options.table:
        outcomes = read_json(saved, Verdicts).outcomes if saved else {}
    else:
        os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
        import_what_tests_need()
        outcomes = check_all([mutation for _, mutation in mutations], saved)
    tried = [(area, mutation) for area, mutation in mutations if mutation.key in outcomes]
    rows = [["package", "fault", "tests", "verdict", "time"]]
    for area, mutation in tried:
        outcome = outcomes[mutation.key]
        rows.append([area, mutation.fault, f"`{mutation.tests}`", outcome.verdict, f"{outcome.seconds:.0f} s"])
    noticed = sum(row[3] == "noticed" for row in rows)
    about = f"{date.today().isoformat()}, {machine_name()}"
    heading = f"{noticed} of {len(tried)} deliberate faults are noticed ({about})."
    if len(tried) < len(mutations):
        heading += f" {len(mutations) - len(tried)} more are in the list and were not tried."
    text = f"{heading}\n\n{markdown_table(rows, left=(0, 1, 2, 3))}\n"
    print(text)
    if options.output:
        write_text(options.output, text)
    return int(noticed < len(mutations))


if __name__ == "__main__":
    sys.exit(main())
