"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from clip_rd_edge.runtime.backends.providers import AUTO, DEVICES

device_option = click.option(
    "--device",
    type=click.Choice(DEVICES),
    default=AUTO,
    show_default=True,
    help="What ONNX Runtime computes on; doctor tells what there is.",
)
threads_option = click.option("--threads", type=click.IntRange(1), help="Threads of the model.  [default: every core]")


class ManyOption(click.Option):
    """An option that takes all that follows up to the next option: --labels "a cat" "a dog"."""

    def add_to_parser(self, parser: click.parser._OptionParser, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        ours = next(parser._long_opt[name] for name in self.opts if name in parser._long_opt)
        process = ours.process

        def take_all(value: str, state: click.parser._ParsingState) -> None:
            process(value, state)
            while state.rargs and not state.rargs[0].startswith("-"):
                process(state.rargs.pop(0), state)

        ours.process = take_all  # type: ignore[method-assign]


class GroupedOption(click.Option):
    """An option that `--help` shows under a heading of its own."""

    def __init__(self, *args: Any, group: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose `--help` shows its options under their groups' headings, in the order of their first option."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                groups.setdefault(getattr(parameter, "group", "") or "Other options", []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def grouped(heading: str) -> Callable[..., Callable[[Any], Any]]:
    """`click.option` for one group of a GroupedCommand."""

    def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
        return click.option(*names, cls=GroupedOption, group=heading, **settings)

    return option


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: those that are not None."""
    return {name: value for name, value in options.items() if value is not None}
