"""The size of the house: `python tests/test_budget.py` prints it.

A limit is raised in the commit whose feature needs it. The limits fall with the package, towards those of the last
column.
"""

from __future__ import annotations

import ast
import csv
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "clip_rd_edge"
LONG = 60  # lines of a function, from `def` on
# What is measured: its limit, and the one to reach.
BUDGETS: Mapping[str, tuple[int, int]] = {
    "modules of the package": (175, 175),
    "lines of the package": (40_850, 33_000),
    "lines of the longest module": (450, 450),
    "parameters of a function": (8, 8),
    f"functions above {LONG} lines": (1, 8),
    "raise statements": (460, 480),
    "lines of Raises: below api/": (20, 60),
    "own modules imported by --help": (9, 12),
    "own modules imported by classify": (34, 34),
    "own modules imported by export": (61, 70),
    "own modules imported by distill": (80, 80),
    "lines of the tests": (27_900, 26_000),
}
_COMMANDS = {
    "--help": "--help",
    "distill": "distill --data pairs.csv --teacher teacher --student test_resnet --image-size 48 --text 64x1 --steps 1 "
    "--context-length 12 --batch-size 2 --precision fp32 --workers 0 -o run",
    "export": "export teacher -o bundle",
    "classify": "classify bundle red.png --labels red blue",
}
# Each command begins without a module of the package; to import other packages anew would take seconds for each.
_COUNT_IMPORTS = """
import os, sys, open_clip, onnx, onnxruntime, onnxscript

def own():
    return [name for name in sys.modules if name.partition(".")[0] == "clip_rd_edge"]

def run(command):
    from clip_rd_edge.cli.main import main
    sys.argv = ["clip-rd-edge", *command.split()]
    sys.stdout = open(os.devnull, "w")
    try:
        main()
    except SystemExit as error:
        assert not error.code, command

def save_teacher():
    from pathlib import Path
    from support import save_tiny_teacher
    save_tiny_teacher(Path("teacher"))

def start(name, call, *arguments):
    if child := os.fork():
        return child
    code = 1
    try:
        call(*arguments)
        print(name, *own(), file=sys.__stdout__, flush=True)
        code = 0
    finally:
        os._exit(code)

def wait(*children):
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)

assert not own()
(shown, distill, export, classify) = (line.split(":") for line in sys.argv[1:])
wait(start("teacher", save_teacher))
wait(*(start(name, run, command) for name, command in (shown, distill, export)))
wait(start(classify[0], run, classify[1]))
"""


class Measured(NamedTuple):
    """A number, and where most of it is."""

    number: int
    place: str


def test_the_house_is_within_its_budget() -> None:
    found = measure()
    print(f"\n{table(found)}")
    over = [
        f"{name}: {number:,}, but the limit is {BUDGETS[name][0]:,}; {place}"
        for name, (number, place) in found.items()
        if number > BUDGETS[name][0]
    ]
    assert not over, "\n".join(["", *over])


def table(found: Mapping[str, Measured]) -> str:
    """Return a line for each number: now, its limit, and the limit to reach."""
    rows = [f"{'':34}{'now':>8}{'limit':>8}{'goal':>8}"]
    for name, (number, place) in found.items():
        limit, goal = BUDGETS[name]
        rows.append(f"{name:34}{number:8,}{limit:8,}{goal:8,}  {place}")
    return "\n".join(rows)


def measure() -> dict[str, Measured]:
    """Measure what has a budget, in the order of the table."""
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    nodes = {path: list(ast.walk(tree)) for path, tree in trees.items()}
    functions = {
        f"{path}: {node.name}": node
        for path in nodes
        for node in nodes[path]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    sizes = {path: len(text.splitlines()) for path, text in texts.items()}
    parameters = {
        name: len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) for name, node in functions.items()
    }
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions.items()}
    long = {name: length for name, length in lengths.items() if length > LONG}
    raising = {path: sum(isinstance(node, ast.Raise) for node in nodes[path]) for path in nodes}
    raises = {path: _raises_lines(text) for path, text in texts.items() if not path.startswith("api/")}
    of_tests = {
        path.relative_to(TESTS).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in TESTS.rglob("*.py")
    }
    imports = _imports()
    measured = [
        Measured(len(sizes), _most(_by_folder(dict.fromkeys(sizes, 1)))),
        Measured(sum(sizes.values()), _most(_by_folder(sizes))),
        Measured(max(sizes.values()), _most(sizes)),
        Measured(max(parameters.values()), _most(parameters)),
        Measured(len(long), _most(long)),
        Measured(sum(raising.values()), _most(_by_folder(raising))),
        Measured(sum(raises.values()), _most(_by_folder(raises))),
        *(imports[command] for command in ("--help", "classify", "export", "distill")),
        Measured(sum(of_tests.values()), _most(_by_folder(of_tests))),
    ]
    return dict(zip(BUDGETS, measured, strict=True))


def _raises_lines(text: str) -> int:
    """Count the lines of `Raises:` sections, each with its heading."""
    count, indent = 0, -1
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip())
        if line.strip() == "Raises:":
            indent = depth
        elif not line.strip() or depth <= indent:
            indent = -1
        count += indent >= 0
    return count


def _imports() -> dict[str, Measured]:
    """Count the modules of the package that each command has imported at its end, packages included."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("red", "blue"):
            Image.new("RGB", (60, 50), name).save(folder / f"{name}.png")
        with (folder / "pairs.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("filepath", "title"), ("red.png", "red"), ("blue.png", "blue")])
        paths = os.pathsep.join([str(PACKAGE.parent), str(TESTS)])
        environment = {
            **os.environ,
            "PYTHONPATH": paths,
            "XDG_CACHE_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        commands = [f"{name}:{command}" for name, command in _COMMANDS.items()]
        arguments = [sys.executable, "-c", _COUNT_IMPORTS, *commands]
        output = subprocess.run(arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    imported = {name: modules for name, *modules in map(str.split, output.stdout.splitlines())}
    folders = {name: Counter(".".join(module.split(".")[1:2]) for module in imported[name]) for name in _COMMANDS}
    return {name: Measured(len(imported[name]), _most(folders[name])) for name in _COMMANDS}


def _by_folder(numbers: Mapping[str, int]) -> Counter[str]:
    folders = Counter[str]()
    for path, number in numbers.items():
        folders[path.split("/")[0]] += number
    return folders


def _most(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in Counter(numbers).most_common(3))


if __name__ == "__main__":
    print(table(measure()))
