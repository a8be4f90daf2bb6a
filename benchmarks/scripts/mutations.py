"""Do the tests notice deliberate faults? Each is applied to a copy of the package, one at a time.

    python benchmarks/scripts/mutations.py -o benchmarks/results/MACHINE/mutations.md   # all of them: an hour or so
    python benchmarks/scripts/mutations.py runtime web                                  # those of two packages

The faults are in benchmarks/mutations.yaml. A fault counts as noticed if the named tests pass without it and fail with
it. Exit code 1 if one goes unnoticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import msgspec

from clip_rd_edge.benchmarking.formatting import markdown_table
from clip_rd_edge.utils.io import read_yaml

ROOT = Path(__file__).parents[2]
COPIED = ("clip_rd_edge", "tests", "benchmarks", "export", "pyproject.toml", "README.md")


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


def read_mutations() -> dict[str, list[Mutation]]:
    """Return the faults of benchmarks/mutations.yaml by area."""
    return read_yaml(ROOT / "benchmarks" / "mutations.yaml", dict[str, list[Mutation]])


def run_tests(copy: Path, tests: str) -> bool:
    """Run fast tests in a copy; return whether there are some and all pass."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *tests.split()]
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if result.returncode not in (0, 1):
        raise SystemExit(f"pytest {tests} ended with exit code {result.returncode}:\n{result.stdout[-2000:]}")
    return result.returncode == 0


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", help="all by default")
    parser.add_argument("-o", "--output", type=Path, help="also write the table into this file")
    options = parser.parse_args()
    areas = read_mutations()
    mutations = [(area, mutation) for area in options.areas or areas for mutation in areas[area]]
    rows, passing = [["package", "fault", "tests", "verdict", "time"]], dict[str, bool]()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
        for area, mutation in mutations:
            outcome = check(mutation, copy, passing)
            rows.append([area, mutation.fault, f"`{mutation.tests}`", outcome.verdict, f"{outcome.seconds:.0f} s"])
            print(f"{outcome.verdict}: {mutation.fault} ({outcome.seconds:.0f} s)", file=sys.stderr, flush=True)
    noticed = sum(row[3] == "noticed" for row in rows)
    heading = f"{noticed} of {len(mutations)} deliberate faults are noticed ({date.today().isoformat()})."
    text = f"{heading}\n\n{markdown_table(rows, left=(0, 1, 2, 3))}\n"
    print(text)
    if options.output:
        options.output.write_text(text)
    return int(noticed < len(mutations))


if __name__ == "__main__":
    sys.exit(main())
