"""How many faults do the tests notice that somebody wrote who had not read them?

    python -m benchmarks.robustness.blind_faults -o benchmarks/results/MACHINE/blind_faults.md

The faults are in blind_faults.yaml, which was committed before the first was run. Each is put into a copy of the
package, alone. The fast tests of its own module are run first, then those of its package; a second call with `--also
tests/runtime tests/distillation`, or `--also tests` for all, runs further ones for those that went unnoticed. A file
with the suffix .json has each verdict as soon as it is known: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import msgspec

from benchmarks.robustness.mutations import COPIED, ROOT, Mutation, apply, import_what_tests_need, run_tests
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.utils.files import write_bytes, write_text
from clip_rd_edge.utils.host import machine_name
from clip_rd_edge.utils.structs import read_json, read_yaml, to_json

FAULTS = Path(__file__).with_suffix(".yaml")
ELSEWHERE = {"api": "tests/test_front_door.py", "settings": "tests/settings tests/test_front_door.py"}


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
    apply(Mutation(fault=fault.what, file=fault.file, old=fault.old, new=fault.new, tests=""), copy)
    started = time.perf_counter()
    try:
        noticed = not run_tests(copy, tests)
    finally:
        path.write_text(original)
    return Verdict(tests if noticed else "", time.perf_counter() - started)


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
