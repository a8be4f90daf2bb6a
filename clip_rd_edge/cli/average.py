"""`clip-rd-edge average`: a model between two."""

from __future__ import annotations

from typing import Any

import click

from clip_rd_edge.cli._command import command_of
from clip_rd_edge.cli._echo import echo
from clip_rd_edge.settings.modelling import Average
from clip_rd_edge.utils.text import as_word


class _Weight(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """A number from 0 to 1, or `best`."""

    name = "weight"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if str(value).casefold() == "best":
            return "best"
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number from 0 to 1 nor best.", param, ctx)
        if not 0 <= number <= 1:
            self.fail(f"{value} is not in the range 0 to 1.", param, ctx)
        return number


@command_of(Average, "average", weight=_Weight())
def command(given: dict[str, Any]) -> None:
    """Average the weights of two models: (1 − SHARE) · FIRST + SHARE · SECOND.

    \b
    clip-rd-edge average runs/general runs/tuned --weight 0.7 -o runs/between
    clip-rd-edge average runs/general runs/tuned --weight best \\
        --task old-images/ --task new-images/ -o runs/between

    A fine-tuned model has forgotten some of what its start knew; between the two there are models that are nearly as
    good at both. FIRST and SECOND are runs' folders or other open_clip models. The result is an open_clip folder, which
    export and distill take. Two models that were trained from different random weights have nothing good between them.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter, print_table, say, stderr

    with console_reporter() as reporter:
        result = edge.average(**given, reporter=reporter)
    if result.curve:
        from clip_rd_edge.benchmarking.report.text import plain_table

        table = plain_table("Weight of the second", *result.curve[0].scores)
        for point in result.curve:
            chosen = " ←" if point.weight == result.weight else ""
            table.add_row(f"{point.weight:g}{chosen}", *(f"{score:.1%}" for score in point.scores.values()))
        print_table(table, console=stderr)
    folder = result.folder
    say(f"next: clip-rd-edge export {as_word(folder)} --precision int8 -o {as_word(f'{folder}-bundle')}")
    echo(f"local-dir:{result.folder}")
