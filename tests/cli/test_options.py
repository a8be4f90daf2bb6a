"""Options that several commands share."""

from __future__ import annotations

import click
import pytest
from support import commands

from clip_rd_edge.cli.options import GroupedCommand, GroupedOption, NameChoice


@pytest.mark.parametrize(("value", "suggestion"), [("INT-8", "'int8'"), ("Half", "'fp16'"), ("xyz", "")])
def test_a_mistyped_name_is_answered_with_the_nearest(value: str, suggestion: str) -> None:
    choice = NameChoice(["fp32", "fp16", "int8"], meant={"half": "fp16"})
    with pytest.raises(click.BadParameter) as raised:
        choice.convert(value, None, None)
    assert f"{value!r} is not one of 'fp32', 'fp16', 'int8'." in raised.value.message
    assert raised.value.message.partition("Did you mean ")[2].rstrip("?") == suggestion


def test_every_choice_of_every_command_suggests_names() -> None:
    choices = [
        parameter.type
        for _, command in commands()
        for parameter in command.params
        if isinstance(parameter.type, click.Choice)
    ]
    assert len(choices) > 5
    assert all(isinstance(choice, NameChoice) for choice in choices)


HELP = [pytest.param(path, command, id=" ".join(path)) for path, command in commands()]


@pytest.mark.parametrize(("path", "command"), HELP)
def test_help_names_groups_defaults_and_units(path: tuple[str, ...], command: click.Command) -> None:
    assert isinstance(command, GroupedCommand)
    context = click.Context(command, info_name=path[-1])
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        assert isinstance(option, GroupedOption), option.name
        assert option.group
        record = option.get_help_record(context)
        assert record is not None
        names, text = record
        # click's words for types say nothing about what the value is.
        assert not [word for word in ("TEXT", "INTEGER", "FLOAT", "RANGE", "PATH") if f" {word}" in names], names
        if not option.is_flag:
            assert "[default: " in text or "[required" in text, names
