"""Run every command in a real terminal, keep what is seen as text, and report what looks wrong.

    pip install pyte
    python -m benchmarks.pages.terminal -o recordings

A newcomer's session on tiny models: the help of every command, the whole way from pairs to a served bundle, Ctrl-C in
whatever takes long, and mistakes. Each line of the session is run in a pseudo-terminal of 80 × 24 and 120 × 40
characters, with colours and without, and in pipes. `pyte` draws what a terminal would show. Reported are: a line that
breaks in the middle of a word, a progress bar or a hidden cursor left behind, colours where NO_COLOR forbids them,
escape sequences in a pipe, a traceback, and another exit code than expected. The recordings are for reading:
recordings/80x24-colour/07-classify.txt. Exit code 1 if there is anything to report.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pyte
from PIL import Image

from clip_rd_edge.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
TIME_LIMIT_S = 900.0  # of a line, on a busy machine
TINY = "--text tiny --image-size 32 --context-length 8 --embedding-size 16 --batch-size 8 --precision fp32 --workers 0"
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 220), "yellow": (230, 220, 40)}
SUITE = """\
name: colours
threads: 1
rounds: 5
tasks: [tasks]
rows:
  - {label: Student, role: student, model: runs/first}
  - {label: ONNX FP32, role: exported, model: bundle}
"""
EVIDENCE = """\
name: two-methods
data: pairs.csv
tasks: [tasks]
students: [test_resnet]
methods:
  - {name: none, recipe: clip}
  - {name: clip-kd, recipe: clip-kd}
compare_with: [none]
seeds: [0, 1]
steps: 2
batch_size: 6
learning_rate: 0.001
precision: fp32
image_size: 32
text: tiny
context_length: 8
embedding_size: 16
views: 1
evaluate_every: 1
log_every: 1
"""
# `clip-rd-edge` as the shell of a newcomer finds it, whichever Python runs this script.
PROGRAM = """\
#!{python}
import sys
sys.argv[0] = "clip-rd-edge"
from clip_rd_edge.cli.main import main
main()
"""
COLOUR = re.compile(r"\x1b\[[0-9;]*\b(3[0-8]|4[0-8]|9[0-7]|10[0-7])(;[0-9;]*)?m")
# A progress bar, and not the border of a table.
PROGRESS = re.compile(r"^[^┏┡┗└]*(━{3}|╸|╺|\belapsed\b)[^┓┩┛┘]*$", re.MULTILINE)


@dataclass(frozen=True)
class Terminal:
    """What a command is connected to; without columns, pipes."""

    name: str
    columns: int = 0
    lines: int = 0
    colour: bool = True


TERMINALS = (
    Terminal("80x24-colour", 80, 24),
    Terminal("80x24-plain", 80, 24, colour=False),
    Terminal("120x40-colour", 120, 40),
    Terminal("120x40-plain", 120, 40, colour=False),
    Terminal("piped"),
)


@dataclass(frozen=True)
class Step:
    """One line of the session.

    Attributes:
        line: as it is typed.
        interrupt: press Ctrl-C as soon as this text is shown.
        codes: the exit codes that are expected.
    """

    line: str
    interrupt: str = ""
    codes: tuple[int, ...] = (0,)


@dataclass
class Recording:
    """What a step showed.

    Attributes:
        text: what is on the screen and above it at the end; from pipes, stdout and then stderr.
        problems: what looks wrong, one sentence each.
    """

    step: Step
    code: int
    text: str
    problems: list[str] = field(default_factory=list)


class Screen(pyte.HistoryScreen):
    """A terminal's screen that remembers which words it broke at its right edge."""

    def __init__(self, columns: int, lines: int) -> None:
        self.broken: list[str] = []
        super().__init__(columns, lines, history=100_000)

    def draw(self, data: str) -> None:
        """Draw text; see pyte."""
        for position, character in enumerate(data):
            if self.cursor.x >= self.columns and not character.isspace():
                row = "".join(self.buffer[self.cursor.y][x].data for x in range(self.columns))
                rest = re.match(r"\S*", data[position:])
                word = row.rpartition(" ")[2] + (rest[0] if rest else "")
                # What is longer than a line has to be broken somewhere.
                if row.rstrip() == row and len(word) < self.columns:
                    self.broken.append(word)
            super().draw(character)

    def text(self) -> str:
        """Return what was scrolled off the screen, and what is on it."""
        above = ["".join(line[x].data for x in range(self.columns)).rstrip() for line in self.history.top]
        return "\n".join([*above, *(line.rstrip() for line in self.display)]).rstrip() + "\n"


def session() -> list[Step]:
    """Return the newcomer's session; what a step writes, later ones use."""
    distil = f"clip-rd-edge distill --data pairs.csv --student test_resnet --recipe clip {TINY}"
    asked = [Step("clip-rd-edge", codes=(0, 2)), Step("clip-rd-edge --help"), Step("clip-rd-edge --version")]
    asked += [Step(f"clip-rd-edge {name} --help") for name in COMMANDS]
    asked += [Step(f"clip-rd-edge {name} --help") for name in ("evidence run", "evidence report")]
    return [
        *asked,
        Step("clip-rd-edge doctor"),
        Step("clip-rd-edge targets"),
        Step("clip-rd-edge targets jetson-orin"),
        Step("clip-rd-edge recipe"),
        Step("clip-rd-edge recipe clip-rd"),
        Step(f"{distil} --steps 4 -o runs/first"),
        Step(f"{distil} --steps 4 -o runs/first", codes=(2,)),
        Step(f"{distil} --steps 100000 -o runs/long", interrupt="training", codes=(75,)),
        Step(f"{distil} --steps 100000 -o runs/long --resume", interrupt="training", codes=(75,)),
        Step("clip-rd-edge embed --data pairs.csv --teacher runs/first --recipe clip-kd -o store"),
        Step(f"{distil} --steps 2 -o runs/other"),
        Step("clip-rd-edge average runs/first runs/other --weight best --task tasks -o runs/between"),
        Step("clip-rd-edge evaluate runs/first --task tasks"),
        Step("clip-rd-edge evaluate runs/first --task tasks --per-class"),
        Step("clip-rd-edge evaluate runs/first --task tasks --json"),
        Step("clip-rd-edge export runs/first -o bundle --labels red green blue"),
        Step("clip-rd-edge export runs/first -o int8 --precision int8 --fallback fp32"),
        Step("clip-rd-edge export runs/first -o bundle", codes=(2,)),
        Step("clip-rd-edge verify bundle"),
        Step("clip-rd-edge classify bundle photos"),
        Step("clip-rd-edge classify bundle photos/red.png --labels red green 'a very long label that goes on and on'"),
        Step("clip-rd-edge classify bundle photos --json"),
        Step("clip-rd-edge classify bundle photos --csv"),
        Step("ls photos/*.png | clip-rd-edge classify bundle - --labels red green"),
        Step("clip-rd-edge classify bundle photos/red.png --labels red"),
        Step("clip-rd-edge index bundle photos -o photos.index"),
        Step("clip-rd-edge search photos.index red"),
        Step("clip-rd-edge search photos.index photos/red.png --top 2"),
        Step("clip-rd-edge serve bundle photos.index --port 0", interrupt="Ctrl-C", codes=(130,)),
        Step("clip-rd-edge demo bundle --port 0", interrupt="Ctrl-C", codes=(130,)),
        Step("clip-rd-edge demo bundle --port 0 --host 0.0.0.0", interrupt="Ctrl-C", codes=(130,)),
        Step("clip-rd-edge benchmark --init"),
        Step("clip-rd-edge benchmark suite.yaml -o report-1"),
        Step("clip-rd-edge benchmark suite.yaml -o report-2"),
        Step("clip-rd-edge benchmark --compare report-1 report-2", codes=(0, 1, 3)),
        Step("clip-rd-edge evidence report report-1 report-2"),
        Step("clip-rd-edge evidence run evidence.yaml -o evidence --teacher local-dir:runs/first/student"),
        Step("clip-rd-edge evidence report evidence/two-methods.json"),
        Step("clip-rd-edge stitch tf_efficientnet_lite0 --names imagenet --text all-MiniLM-L6-v2 -o teacher"),
        Step("clip-rd-edge trim teacher --text-layers 2 --vocabulary 7500 --texts pairs.csv -o trimmed"),
        Step("clip-rd-edge quickstart -o quickstart --teacher-steps 2 --student-steps 2"),
        Step("clip-rd-edge quickstart -o quickstart --teacher-steps 2 --student-steps 2"),
        Step("clip-rd-edge build tasks --teacher teacher --target cpu-x86 --steps 2 -o built"),
        Step("clip-rd-edge pack pairs.csv -o shards"),
        Step("clip-rd-edge teach bundle tasks -o taught"),
        Step("clip-rd-edge quickstart -o interrupted", interrupt="training", codes=(75,)),
        *(
            Step(line, codes=(1, 2))
            for line in (
                "clip-rd-edge classfy bundle photos",
                "clip-rd-edge classify bundle photos --label red",
                "clip-rd-edge classify bundle photos/rde.png --labels red green",
                "clip-rd-edge classify bundle photos --labels labelz.txt",
                "clip-rd-edge classify runs/first/student photos --labels red green",
                "clip-rd-edge distill --data pears.csv --student resnet18 --recipe clip -o runs/second",
                "clip-rd-edge distill --data pairs.csv --student resnet81 --recipe clip -o runs/second",
                "clip-rd-edge distill --data pairs.csv --student resnet18 -o runs/second",
                "clip-rd-edge evaluate bundle --task emoji:unseen-styel",
                "clip-rd-edge export runs/first -o other --target jetson",
                "clip-rd-edge search photos.index photos/rde.png",
                "clip-rd-edge verify runs/first",
                "clip-rd-edge benchmark nothing.yaml -o report-3",
                "clip-rd-edge serve nothing",
            )
        ),
    ]  # fmt: skip


def prepare(folder: Path) -> None:
    """Write the images, tables and suites that the session uses."""
    (folder / "photos").mkdir(parents=True)
    rows = [("filepath", "title")]
    for name, colour in COLOURS.items():
        Image.new("RGB", (48, 40), colour).save(folder / "photos" / f"{name}.png")
        (folder / "tasks" / name).mkdir(parents=True)
        for number in range(9):  # 36 pairs: INT8 needs 32
            shade = tuple(max(0, part - 5 * number) for part in colour)
            path = folder / "tasks" / name / f"{number}.png"
            Image.new("RGB", (48, 40), shade).save(path)
            rows.append((str(path.relative_to(folder)), f"a {name} image, number {number}"))
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "suite.yaml").write_text(SUITE)
    (folder / "evidence.yaml").write_text(EVIDENCE)


def environment(terminal: Terminal, programs: Path) -> dict[str, str]:
    """Return the variables of a newcomer's shell."""
    unwanted = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "COLORTERM")
    variables = {name: value for name, value in os.environ.items() if name not in unwanted}
    variables |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "TERM": "xterm-256color"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return variables if terminal.colour else {**variables, "NO_COLOR": "1"}


def write_program(folder: Path) -> Path:
    """Write the program `clip-rd-edge` into a folder, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "clip-rd-edge"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    return folder


def shell(line: str) -> list[str]:
    """Return the command that runs a line; a program alone takes the shell's place, which Ctrl-C would end, too."""
    alone = line.startswith("clip-rd-edge") and "|" not in line
    return ["sh", "-c", f"exec {line}" if alone else line]


def run_in_terminal(step: Step, terminal: Terminal, cwd: Path, variables: dict[str, str]) -> tuple[int, bytes]:
    """Run a step in a pseudo-terminal; return its exit code and every byte that it wrote."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", terminal.lines, terminal.columns, 0, 0))
    process = subprocess.Popen(
        shell(step.line), stdin=inner, stdout=inner, stderr=inner, cwd=cwd, env=variables,
        start_new_session=True, preexec_fn=_as_from_a_shell,
    )  # fmt: skip
    os.close(inner)
    seen, pressed, deadline = b"", False, time.monotonic() + TIME_LIMIT_S
    while time.monotonic() < deadline:
        if select.select([outer], [], [], 0.2)[0]:
            try:
                seen += os.read(outer, 65536)
            except OSError:  # the other side is closed
                break
        if step.interrupt and not pressed and step.interrupt.encode() in seen:
            pressed = True
            time.sleep(0.5)  # nobody is faster
            os.write(outer, b"\x03")
    code = _end(process)
    os.close(outer)
    return code, seen


def _as_from_a_shell() -> None:
    """Give a new process its terminal, and let Ctrl-C end it even if this script is a job in the background."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    _let_interrupt()


def _let_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes]) -> int:
    """Return the exit code of a process that has closed its output; one that has not is killed."""
    try:
        return process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return -1


def run_in_pipes(step: Step, cwd: Path, variables: dict[str, str]) -> tuple[int, str, str]:
    """Run a step in pipes; return its exit code, stdout and stderr. It is interrupted where a terminal's user would."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            shell(step.line), stdin=subprocess.DEVNULL,
            stdout=out, stderr=err, cwd=cwd, env=variables, start_new_session=True, preexec_fn=_let_interrupt,
        )  # fmt: skip

        def read(file: IO[bytes]) -> str:
            return os.pread(file.fileno(), 1 << 30, 0).decode(errors="replace")

        deadline, pressed = time.monotonic() + TIME_LIMIT_S, False
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            if step.interrupt and not pressed and step.interrupt in read(out) + read(err):
                pressed = True
                time.sleep(0.5)
                os.killpg(process.pid, signal.SIGINT)
        return _end(process), read(out), read(err)


def record(step: Step, terminal: Terminal, cwd: Path, programs: Path) -> Recording:
    """Run a step and return what was seen."""
    variables = environment(terminal, programs)
    if not terminal.columns:
        code, out, err = run_in_pipes(step, cwd, variables)
        recording = Recording(step, code, f"{out}--- stderr ---\n{err}")
        recording.problems += ["a pipe gets escape sequences"] if "\x1b" in out + err else []
        recording.problems += ["a pipe gets a progress bar"] if PROGRESS.search(out + err) else []
    else:
        code, written = run_in_terminal(step, terminal, cwd, variables)
        screen = Screen(terminal.columns, terminal.lines)
        pyte.ByteStream(screen).feed(written)
        recording = Recording(step, code, screen.text())
        if " --json" not in step.line:  # one line per object, which is for programs
            recording.problems += [f"a line breaks within {word!r}" for word in screen.broken]
        recording.problems += left_behind(screen)
        if not terminal.colour and COLOUR.search(written.decode(errors="replace")):
            recording.problems.append("there are colours in spite of NO_COLOR")
    if code not in step.codes:
        recording.problems.append(f"exit code {code}; expected {' or '.join(map(str, step.codes))}")
    if "Traceback (most recent call last)" in recording.text:
        recording.problems.append("a traceback is shown")
    return recording


def left_behind(screen: Screen) -> list[str]:
    """Return what a command should have put away at its end."""
    problems = ["the cursor stays hidden"] if screen.cursor.hidden else []
    problems += ["the prompt would not begin a line"] if screen.cursor.x else []
    problems += [f"left behind: {line.strip()}" for line in screen.text().splitlines() if PROGRESS.search(line)]
    return problems


def play(steps: Sequence[Step], terminal: Terminal, output: Path) -> list[Recording]:
    """Run a session in a new folder, and write its recordings."""
    output.mkdir(parents=True)
    recordings = []
    with tempfile.TemporaryDirectory() as name:
        cwd = Path(name) / "home"
        prepare(cwd)
        programs = write_program(Path(name) / "bin")
        for number, step in enumerate(steps, start=1):
            recording = record(step, terminal, cwd, programs)
            recordings.append(recording)
            words = re.sub(r"[^a-z0-9]+", "-", step.line.removeprefix("clip-rd-edge").lower()).strip("-")[:40]
            lines = [f"$ {step.line}", recording.text.rstrip("\n"), f"[exit code {recording.code}]"]
            lines += [f"[PROBLEM: {problem}]" for problem in recording.problems]
            (output / f"{number:02d}-{words or 'alone'}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            for problem in recording.problems:
                print(f"{terminal.name}: {step.line}: {problem}", flush=True)
    return recordings


def main() -> None:
    """Record the session in every terminal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder, which is replaced")
    names = [terminal.name for terminal in TERMINALS]
    parser.add_argument("--terminals", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--only", default="", metavar="TEXT", help="record only the lines with this text")
    parser.add_argument("--skip", nargs="*", default=(), metavar="TEXT", help="leave out the lines with these texts")
    args = parser.parse_args()
    steps = [step for step in session() if args.only in step.line]
    steps = [step for step in steps if not any(text in step.line for text in args.skip)]
    count = problems = 0
    for terminal in TERMINALS:
        if terminal.name in args.terminals:
            shutil.rmtree(args.output / terminal.name, ignore_errors=True)
            recordings = play(steps, terminal, args.output / terminal.name)
            count += len(recordings)
            problems += sum(len(recording.problems) for recording in recordings)
    print(f"{count} recordings, {problems} problems: {args.output}")
    sys.exit(problems > 0)


if __name__ == "__main__":
    main()
