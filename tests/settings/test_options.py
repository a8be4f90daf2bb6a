"""One declaration of an option, as a keyword, as a flag and in the reference."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import pytest
from click.testing import CliRunner

from clip_rd_edge.cli.options import command_of
from clip_rd_edge.errors import UsageError
from clip_rd_edge.settings.options import Settings, argument, declared, keywords_of, option

AnyPath = str | os.PathLike[str]
Share = Annotated[float, option("Share.", group="Main", metavar="SHARE", gt=0, lt=1)]


class Base(Settings, frozen=True):
    source: Annotated[AnyPath, argument("What is read.", path=True)]


class Request(Base, frozen=True, kw_only=True):
    share: Share | None = None
    count: Annotated[int, option("How many; see {share}.", group="Main", metavar="N", ge=1)] = 3
    kind: Annotated[
        Literal["fp32", "fp16"] | None,
        option("Kind.", group="Main", metavar="KIND", default="x"),
    ] = None
    names: Annotated[
        AnyPath | Sequence[AnyPath], option("Names.", flags=("--name",), group="Main", metavar="NAME", default="none")
    ] = ()
    quick: Annotated[bool, option("Be quick.", group="Main")] = False
    cache: Annotated[bool, option("Cache.", group="Main")] = True
    output: Annotated[
        AnyPath, option("Where to.", flags=("-o", "--output"), group="Output", metavar="FOLDER", path=True)
    ]
    stop: object = None  # for Python alone


@keywords_of(Request)
def run(request: Request) -> Request:
    """Run."""
    return request


def test_the_fields_are_the_keywords() -> None:
    request = run("a.csv", share=0.5, output=Path("out"))
    assert (request.source, request.share, request.count, request.output) == ("a.csv", 0.5, 3, Path("out"))
    parameters = inspect.signature(run).parameters
    assert list(parameters) == ["source", "share", "count", "kind", "names", "quick", "cache", "output", "stop"]
    assert parameters["source"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert parameters["share"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"share": 0.0}, "share"),
        ({"count": "3"}, "count"),
        ({"kind": "fp8"}, "kind"),
        ({"names": ["a", None]}, "names"),
        ({"output": ""}, "output"),
        ({"source": b"a.csv"}, "source"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_its_option(arguments: dict[str, Any], option: str) -> None:
    with pytest.raises(UsageError) as refused:
        run(**{"source": "a.csv", "output": "out", **arguments})
    assert refused.value.option == option
    assert option in str(refused.value)


def test_a_wrong_call_is_answered_with_the_right_name() -> None:
    with pytest.raises(UsageError, match=r"'outptu'.*'output'"):
        run("a.csv", outptu="out")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'output'"):
        run("a.csv")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        run("a.csv", "out")  # type: ignore[misc, call-arg]


@command_of(Request, "run")
@click.option("--json", "as_json", is_flag=True)
def command(given: dict[str, Any], as_json: bool) -> None:
    """Run."""
    click.echo(repr((sorted(given.items()), as_json)))


def test_the_command_line_gives_what_was_given_and_nothing_else() -> None:
    result = CliRunner().invoke(
        command, ["a.csv", "-o", "out", "--kind", "FP16", "--name", "x", "--name", "y", "--json"]
    )
    given = {"kind": "fp16", "names": ("x", "y"), "output": "out", "source": "a.csv"}
    assert result.output.strip() == repr((sorted(given.items()), True))
    result = CliRunner().invoke(command, ["a.csv", "-o", "out", "--quick", "--no-cache", "--share", "0.5"])
    given = {"cache": False, "output": "out", "quick": True, "share": 0.5, "source": "a.csv"}
    assert result.output.strip() == repr((sorted(given.items()), False))


@pytest.mark.parametrize("arguments", [["--share", "0"], []])
def test_the_command_line_refuses_what_python_refuses(arguments: list[str]) -> None:
    needed = ["a.csv", "-o", "out"] if arguments else ["a.csv"]
    assert CliRunner().invoke(command, [*needed, *arguments]).exit_code == 2


def test_help_and_reference_name_each_option_their_own_way() -> None:
    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    for part in ("How many; see --share. [default: 3] [x>=1]", "[0<x<1]", "--cache / --no-cache",
                 "Kind. [default: x]", "-o, --output FOLDER Where to. [required]", "SOURCE"):  # fmt: skip
        assert part in text
    assert "stop" not in {entry.name for entry in declared(Request)}
