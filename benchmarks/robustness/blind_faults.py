"""How many faults do the tests notice that somebody wrote who had not read them?

    python -m benchmarks.robustness.blind_faults -o benchmarks/results/MACHINE/blind_faults.md

The faults are in blind_faults.yaml, which was committed before the first was run. Each is put into a copy of the
package, alone. The fast tests of its own module are run first, then those of its package; a second call with `--also
tests/runtime tests/distillation`, or `--also tests` for all, runs further ones for those that went unnoticed. A file
with the suffix .json has each verdict as soon as it is known: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
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
FAULTS = Path(__file__).with_suffix(".yaml")
ELSEWHERE = {
    "pipeline.py": "tests/test_pipeline.py",
    "api": "tests/test_front_door.py",
    "settings": "tests/settings tests/test_front_door.py",
}


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A deliberate fault: a text that occurs exactly once in a file, and what replaces it."""

    file: str
    old: str
    new: str
    what: str

    @property
    def tests(self) -> str:
        """The tests of its module, then those of its package."""
        _, package, *rest = Path(self.file).parts
        module = Path("tests", package, *rest[:-1], f"test_{Path(self.file).stem}.py")
        first = [str(module)] if (ROOT / module).exists() else []
        return " ".join([*first, ELSEWHERE.get(package, f"tests/{package}")])


class Verdict(msgspec.Struct, frozen=True):
    """Which tests noticed a fault, empty if none did, and in how many seconds."""

    by: str
    seconds: float


class Verdicts(msgspec.Struct, frozen=True):
    """What is known so far, by what a fault does."""

    machine: str
    verdicts: dict[str, Verdict]


def check(fault: Fault, copy: Path, tests: str) -> Verdict:
    """Run tests with a fault; leave the copy as it was."""
    path = copy / fault.file
    original = path.read_text()
    if original.count(fault.old) != 1:
        raise SystemExit(f"{fault.what}: {fault.old!r} occurs {original.count(fault.old)} times in {fault.file}.")
    path.write_text(original.replace(fault.old, fault.new))
    started = time.perf_counter()
    try:
        noticed = not run_tests(copy, tests)
    finally:
        path.write_text(original)
    return Verdict(tests if noticed else "", time.perf_counter() - started)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the table; verdicts are saved beside it")
    parser.add_argument("--also", nargs="+", default=[], metavar="TESTS", help="further tests for what went unnoticed")
    options = parser.parse_args()
    faults, saved = read_yaml(FAULTS, list[Fault]), options.output.with_suffix(".json")  # type: ignore[type-var]
    verdicts = read_json(saved, Verdicts).verdicts if saved.exists() else {}
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    import_what_tests_need()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
        for fault in faults:
            known = verdicts.get(fault.what)
            if known is not None and (known.by or not options.also):
                continue
            tests = fault.tests if known is None else " ".join(options.also)
            verdicts[fault.what] = verdict = check(fault, copy, tests)
            print(f"{verdict.by or 'unnoticed'}: {fault.what} ({verdict.seconds:.0f} s)", file=sys.stderr, flush=True)
            write_bytes(saved, to_json(Verdicts(machine_name(), verdicts)))
    noticed = sum(bool(verdict.by) for verdict in verdicts.values())
    rows = [["file", "fault", "noticed by"]]
    rows += [[f"`{fault.file}`", fault.what, f"`{by}`" if (by := verdicts[fault.what].by) else "**nothing**"]
             for fault in faults]  # fmt: skip
    extent = " ".join(["the fast tests of their own packages", *(["and", *options.also] if options.also else [])])
    heading = f"{noticed} of {len(faults)} are noticed by {extent} ({date.today().isoformat()}, {machine_name()})."
    write_text(options.output, f"{heading}\n\n{markdown_table(rows, left=(0, 1, 2))}\n")
    print(heading)
    return 0


if __name__ == "__main__":
    sys.exit(main())
