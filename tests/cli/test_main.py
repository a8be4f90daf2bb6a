"""Common behaviour of all commands: fast help, short error messages, exit codes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import PATIENCE_S, CommandLine, is_running

from clip_rd_edge.cli.main import EXTRA_PACKAGES
from clip_rd_edge.errors import install_command

EXTRAS_MODULES = (*(module for modules in EXTRA_PACKAGES.values() for module in modules), "cv2", "openvino", "tensorrt")


def loaded_modules(code: str) -> set[str]:
    """Run `code` in a new interpreter; return the top-level modules that it loaded."""
    script = f"import sys\n{code}\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(process.stdout.split())


def test_the_package_and_its_help_import_nothing_heavy() -> None:
    code = """
import contextlib, io
import clip_rd_edge
dir(clip_rd_edge)
from clip_rd_edge.cli.main import cli
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    cli.main(["--help"])"""
    assert not loaded_modules(code) & {"torch", "onnxruntime", "numpy", "PIL", "rich", "msgspec"}


def test_classify_works_without_extras(colour_bundle: Path, colour_images: Path) -> None:
    arguments = ["classify", str(colour_bundle), str(colour_images / "red.png"), "--labels", "red", "blue"]
    code = f"""
import contextlib, io
for name in {EXTRAS_MODULES!r}:
    sys.modules[name] = None  # as if it were not installed
sys.argv = ["clip-rd-edge", *{arguments!r}]
from clip_rd_edge.cli.main import main
with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
    main()
assert output.getvalue().split("\\t")[1].startswith("red"), output.getvalue()"""
    assert "onnxruntime" in loaded_modules(code)


LOST = """
import atexit, multiprocessing, sys, time
from clip_rd_edge.cli import main
from clip_rd_edge.errors import LostProcessError

def lose(arguments):
    loader = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))  # not a daemon: exiting waits
    loader.start()
    print(loader.pid, flush=True)
    raise LostProcessError("Process 1 (on b) of the run has ended.", hint="resume")

atexit.register(print, "taken down")
main._run = lose
main.main()
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for a loader in /proc")
def test_a_run_that_lost_a_process_ends_at_once_with_its_loaders() -> None:
    result = subprocess.run([sys.executable, "-c", LOST, "distill"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr.splitlines()[0] == "error: Process 1 (on b) of the run has ended."
    (loader,) = result.stdout.split()  # and nothing else
    end = time.monotonic() + 60
    while is_running(int(loader)):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.skipif(os.name == "nt", reason="closes streams with a POSIX shell")
def test_what_nobody_can_read_is_no_success(colour_bundle: Path, colour_images: Path) -> None:
    def run(closed: str, *words: str | Path) -> tuple[int, str]:
        command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "clip_rd_edge", *map(str, words)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, stdout=stdout)
        return done.returncode, done.stderr.removeprefix("· starting verify\n")

    reader, stdout = os.pipe()
    os.close(reader)  # as head does, once it has its lines
    classify = ("classify", colour_bundle, colour_images / "red.png", "--labels", "red", "blue")
    for words in (classify, ("verify", colour_bundle)):  # plain text, and a table of rich
        assert run("", *words) == (1, "")
        code, error = run(">&-", *words)
        assert (code, error.startswith("error: What is printed would be lost: stdout is closed.")) == (2, True)
    os.close(stdout)
    stdout = subprocess.DEVNULL
    code, error = run("<&-", *classify[:2], "-", *classify[3:])
    assert (code, "the list on stdin is empty" in error) == (2, True)
    assert run("2>&-", *classify) == (0, "")


CUT = """
import sys
from rich.table import Table
from clip_rd_edge.cli import main
from clip_rd_edge.cli.console import print_table
from clip_rd_edge.cli.output import echo

def answer(arguments):
    table = Table("x" * 100)
    for row in range(100):
        table.add_row("y" * 100)
    echo("\\udcff\\0" * 10_000, nl=False) if "--print0" in arguments else print_table(table)

main._run = answer
main.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="limits the size of a file with a POSIX shell")
@pytest.mark.parametrize(("kind", "unbuffered"), [("--print0", "1"), ("table", "")])
def test_results_that_do_not_fit_the_disk_are_not_called_whole(tmp_path: Path, kind: str, unbuffered: str) -> None:
    """A file without Python's buffer, as containers have it, takes what there is room for and says nothing."""
    command = ["sh", "-c", 'ulimit -f 8; exec "$@" > answers', "sh", sys.executable, "-c", CUT, kind]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert (tmp_path / "answers").stat().st_size in (8 * 512, 8 * 1024)  # dash's blocks and bash's
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: A file is larger than")
    assert hint.startswith("hint: see ulimit")


@pytest.mark.parametrize(
    ("error", "expected", "shown"),
    [
        (OSError(errno.ENOSPC, "", "/m"), 1, "/m"),
        (OSError(errno.EMFILE, "open files"), 1, "ulimit"),
        (MemoryError(), 1, "memory"),
        (ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"), 2, install_command("train")),
    ],
)
def test_what_the_machine_lacks_is_reported_in_one_line(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: int, shown: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("clip_rd_edge.exporting.plan.target_names", fail)
    code, _, printed = command_line("targets")
    assert (code, printed.startswith("error: "), shown in printed) == (expected, True, True)


@pytest.mark.skipif(os.name != "posix", reason="Windows ends a process without asking it")
@pytest.mark.usefixtures("hang_up")
@pytest.mark.parametrize(("name", "raised"), [("SIGTERM", "ImportError"), ("SIGHUP", "SystemExit")])
def test_a_signal_removes_what_is_unfinished_before_it_ends_the_process(tmp_path: Path, name: str, raised: str) -> None:
    code = f"""
import sys, time
from pathlib import Path
from clip_rd_edge.cli import main
from clip_rd_edge.utils.outputs import new_folder

def export(arguments):
    with new_folder(Path(sys.argv[1])) as folder:
        (folder / "image.onnx").touch()
        print(f"writing {{folder}}", flush=True)
        try:
            time.sleep(300)
        except {"SystemExit" if raised == "ImportError" else "ValueError"} as error:
            raise ImportError("cannot import a library in C++") from error

main._run = export
main.main()"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "bundle")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline().startswith("writing")
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    process.send_signal(signal.Signals[name])
    assert process.communicate(timeout=PATIENCE_S) == ("", "")
    assert process.returncode == -signal.Signals[name]
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_a_library_is_imported_is_an_interruption(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pybind11 turns what its module's initialization raises into an ImportError."""

    def run(arguments: list[str]) -> None:
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setattr("clip_rd_edge.cli.main._run", run)
    assert command_line("doctor") == (130, "", "Interrupted.\n")
