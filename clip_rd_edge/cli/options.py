"""Options and option classes that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from clip_rd_edge.cli.output import LateReporter, echo
from clip_rd_edge.errors import UsageError, spelled

if TYPE_CHECKING:
    from clip_rd_edge.settings.options import Declared, Settings


def refuse_together(given: Mapping[str, bool]) -> None:
    """Refuse a call with several options of which one is meant."""
    if all(given.values()):
        raise UsageError(f"{' and '.join(given)} cannot be combined.", hint="omit one of them")


OTHER_OPTIONS = "Other options"
_OPTION_COLUMNS = 26  # max width of the options; the description of a longer one begins on the next line


class GroupedOption(click.Option):
    """An option that `--help` lists under the heading of its group.

    Where some options of a command are common, `--help` lists these and the required ones, and `--help-all` all.
    """

    def __init__(self, *args: Any, group: str = "", also: str = "", common: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group, self.also, self.common = group, also, common


class ManyOption(GroupedOption):
    """An option that takes all arguments up to the next option: --labels "a cat" "a dog"."""

    def add_to_parser(self, parser: click.parser._OptionParser, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        option = next(parser._long_opt[name] for name in self.opts if name in parser._long_opt)
        process = option.process

        def take_all(value: str, state: click.parser._ParsingState) -> None:
            # click takes the first value unseen. Another option comes here if an empty variable was to give the values.
            if value.partition("=")[0] in {**parser._long_opt, **parser._short_opt}:
                raise click.BadOptionUsage(self.opts[0], f"Option {self.opts[0]!r} requires an argument.", ctx)
            process(value, state)
            while state.rargs and not state.rargs[0].startswith("-"):
                process(state.rargs.pop(0), state)

        option.process = take_all  # type: ignore[method-assign]


EXAMPLE_MARK = "\b"  # click's, for paragraphs that are not wrapped
_UNBROKEN_HYPHEN = "\u2011"


class ExampleFirst(click.Command):
    """A command whose `--help` has the examples, its paragraphs marked with `\\b`, under a heading of their own.

    No line ends within a word with hyphens, such as the name of an option.
    """

    def get_help(self, ctx: click.Context) -> str:
        return super().get_help(ctx).replace(_UNBROKEN_HYPHEN, "-")

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            if paragraph.startswith(EXAMPLE_MARK):
                lines = paragraph.removeprefix(EXAMPLE_MARK).strip("\n").splitlines()
                commands = [line for line in lines if not line.startswith(" ")]
                with formatter.section("Examples" if len(commands) > 1 else "Example"):
                    formatter.write("".join(f"{' ' * formatter.current_indent}{line}\n" for line in lines))
            else:
                formatter.write_paragraph()
                with formatter.indentation():
                    formatter.write_text(paragraph.replace("-", _UNBROKEN_HYPHEN))


class GroupedCommand(ExampleFirst):
    """A command whose `--help` lists its options by group, in the order of the groups' first options."""

    @property
    def _is_long(self) -> bool:
        return any(getattr(parameter, "common", False) for parameter in self.params)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        parameters = super().get_params(ctx)
        if self._is_long:
            text = f"Show this message with all {len(self.params)} options and exit."
            parameters.append(
                click.Option(
                    ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all, help=text
                )
            )
        return parameters

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        is_short = self._is_long and not ctx.meta.get(_ALL)
        for parameter in self.get_params(ctx):
            is_common = parameter.required or getattr(parameter, "common", False)
            if is_short and parameter in self.params and not is_common:
                continue
            # From click 8.5 on, arguments have help records, too; the docstring describes them.
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                heading = getattr(parameter, "group", "") or OTHER_OPTIONS
                groups.setdefault(heading, []).append((record[0], record[1].replace("-", _UNBROKEN_HYPHEN)))
        if list(groups) == [OTHER_OPTIONS]:
            groups = {"Options": groups[OTHER_OPTIONS]}
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=_OPTION_COLUMNS)


_ALL = f"{__name__}.all"


def _show_all(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[_ALL] = True
        echo(ctx.get_help())
        ctx.exit()


class CommandGroup(ExampleFirst, click.Group):
    """A group of commands whose `--help` shows examples as that of the commands does."""


def grouped(heading: str) -> Callable[..., Callable[[Any], Any]]:
    """Return a variant of `click.option` for one group of a GroupedCommand."""

    def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
        return click.option(*names, cls=settings.pop("cls", GroupedOption), group=heading, **settings)

    return option


def completed_by(names: Iterable[str] | Callable[[], Iterable[str]]) -> Callable[..., list[CompletionItem]]:
    """Return a `shell_complete` callback that offers names, or calls a function that imports them, and file names."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        known = names() if callable(names) else names
        matches = [CompletionItem(name) for name in known if name.startswith(incomplete)]
        return matches or [CompletionItem(incomplete, type="file")]

    return complete


def packaged_names(folder: str, suffix: str) -> Callable[[], list[str]]:
    """Return a function that lists the files of a folder of the package, without their suffix; it imports nothing."""
    return lambda: sorted(path.stem for path in (Path(__file__).parents[1] / folder).glob(f"*{suffix}"))


def _targets() -> list[str]:
    from clip_rd_edge.exporting.plan import TARGETS, target_names

    return sorted({*target_names(), *TARGETS})


def _tasks() -> Iterable[str]:
    from clip_rd_edge.data.tasks import BUILT_IN_TASKS

    return BUILT_IN_TASKS


def complete_targets(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the last of several targets of an export, which are separated by commas."""
    before = incomplete[: incomplete.rfind(",") + 1]
    return completed_by(lambda: [before + name for name in _targets()])(context, parameter, incomplete)


COMPLETIONS = {
    "data": completed_by(("emoji",)),
    "labels": completed_by(("everyday",)),
    "recipe": completed_by(packaged_names("distillation/recipes", ".yaml")),
    "student": completed_by(packaged_names("models/configs", ".json")),
    "targets": complete_targets,
    "task": completed_by(_tasks),
}


def command_of(
    settings: type[Settings], name: str, short_help: str | None = None, **types: Any
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function the command of a struct; it gets what differs from the defaults, by the names of Python.

    Parameters that only the command line has are added to the function by click's own decorators, and passed by name.

    Args:
        short_help: for the list of the commands of a group.
        types: of options whose values are neither numbers nor choices nor paths, by the name of the option.
    """
    from clip_rd_edge.settings.options import declared  # which imports msgspec: `--help` of all commands does not

    def decorate(function: Callable[..., None]) -> click.Command:
        own: list[click.Parameter] = list(reversed(getattr(function, "__click_params__", [])))
        entries = [entry for entry in declared(settings) if entry.name not in {parameter.name for parameter in own}]
        parameters = [*(_parameter(entry, types.get(entry.name)) for entry in entries), *own]

        def call(**values: Any) -> None:
            given = {}
            for entry in entries:
                value = values.pop(entry.name)
                if entry.name in ("bundle", "bundles"):
                    value = _opened(entry.default if value == () else value)
                if value not in (None, (), entry.default):
                    given[entry.name] = value
            function(given, **values)

        return GroupedCommand(
            name, callback=call, params=sorted(parameters, key=_place), help=function.__doc__, short_help=short_help
        )

    return decorate


def _opened(bundle: Any) -> Any:
    """Return a bundle's folder, or several; the built-in one is made first if it is missing, with a progress bar."""
    if isinstance(bundle, tuple):
        return tuple(map(_opened, bundle))
    if not str(bundle).endswith("everyday"):  # else what follows imports a third of the modules of a classification
        return bundle
    from clip_rd_edge.api.exporting import is_built_in, place_of

    if not is_built_in(bundle):
        return bundle
    with ExitStack() as stack:
        return place_of(bundle, reporter=LateReporter(stack))


_LAST_GROUPS = ("Device", "Cluster", "Output")


def _place(parameter: click.Parameter) -> int:
    group = getattr(parameter, "group", None)
    return -1 if group is None else 1 + _LAST_GROUPS.index(group) if group in _LAST_GROUPS else 0


def _parameter(entry: Declared, kind: click.ParamType | None) -> click.Parameter:  # type: ignore[type-arg]
    from msgspec import NODEFAULT

    required = entry.default is NODEFAULT
    source = entry.option.complete
    complete = COMPLETIONS.get(source) or (completed_by(source.split("|")) if source else None)
    settings: dict[str, Any] = {"type": kind or _click_type(entry), "shell_complete": complete}
    metavar = entry.option.metavar or None
    if entry.option.is_argument:
        nargs = -1 if entry.several else 1
        metavar = f"{metavar}..." if metavar and entry.several else metavar
        return click.Argument([entry.name], required=required, nargs=nargs, metavar=metavar, **settings)
    flags = entry.option.flags or [_flag(entry.name)]
    text, words = (spelled(part, _flag) for part in (entry.text, entry.option.default))
    if entry.kind is bool:
        flags = [f"{flags[0]}/--no-{flags[0].removeprefix('--')}"] if entry.default is True else flags
        settings, default = {"is_flag": True, "default": entry.default}, ""
    else:
        default = words or ("" if required or entry.default in (None, (), "") else str(entry.default))
    return (ManyOption if entry.option.many else GroupedOption)(
        [*flags, entry.name],
        group=entry.option.group,
        also=entry.option.also,
        common=entry.option.common,
        required=required,
        multiple=entry.several or entry.option.many,
        metavar=metavar,
        help=f"{text}  [default: {default}]" if default else text,
        **settings,
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _click_type(entry: Declared) -> click.ParamType | None:  # type: ignore[type-arg]
    limits = entry.limits
    if isinstance(entry.kind, tuple):
        return click.Choice(entry.kind, case_sensitive=False)
    if entry.kind in (int, float) and limits:
        kind: Any = click.IntRange if entry.kind is int else click.FloatRange
        low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
        return kind(low, high, min_open="gt" in limits, max_open="lt" in limits)  # type: ignore[no-any-return]
    return click.Path() if entry.option.path else click.types.convert_type(entry.kind)
