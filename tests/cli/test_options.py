"""Options that several commands share."""

from __future__ import annotations

import click
import pytest
from support import commands

from clip_rd_edge.cli._options import NameChoice


@pytest.mark.parametrize(
    ("value", "suggestion"),
    [("itn8", "'int8'"), ("INT-8", "'int8'"), ("Half", "'fp16'"), ("fp1", "'fp16'"), ("int4", "'int8'"), ("xyz", "")],
)
def test_a_mistyped_name_is_answered_with_the_nearest(value: str, suggestion: str) -> None:
    choice = NameChoice(["fp32", "fp16", "int8"], meant={"half": "fp16"})
    with pytest.raises(click.BadParameter) as raised:
        choice.convert(value, None, None)
    assert f"{value!r} is not one of 'fp32', 'fp16', 'int8'." in raised.value.message
    assert raised.value.message.partition("Did you mean ")[2].rstrip("?") == suggestion


def test_a_name_is_taken_in_any_case_and_given_as_it_is_written() -> None:
    assert NameChoice(["fp32", "int8"]).convert("INT8", None, None) == "int8"


def test_a_word_for_a_name_that_the_option_lacks_is_not_suggested() -> None:
    with pytest.raises(click.BadParameter) as raised:
        NameChoice(["fp32", "bf16"], meant={"half": "fp16"}).convert("half", None, None)
    assert "Did you mean" not in raised.value.message


def test_every_choice_of_every_command_suggests_names() -> None:
    choices = [
        parameter.type
        for _, command in commands()
        for parameter in command.params
        if isinstance(parameter.type, click.Choice)
    ]
    assert len(choices) > 5
    assert all(isinstance(choice, NameChoice) for choice in choices)
