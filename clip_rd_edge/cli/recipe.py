"""`clip-rd-edge recipe`: show training recipes."""

from __future__ import annotations

import click

from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import CommandGroup, GroupedCommand, complete_recipe


@click.group("recipe", cls=CommandGroup, short_help="Show the training recipes, to start your own from.")
def command() -> None:
    """Show the training recipes of distill.

    \b
    clip-rd-edge recipe show
    """


@command.command("show", cls=GroupedCommand, short_help="Print a recipe with comments, or list all recipes.")
@click.argument("name", required=False, shell_complete=complete_recipe)
def show(name: str | None) -> None:
    """Print the recipe NAME as YAML with a comment on each key; without NAME, list the recipes.

    \b
    clip-rd-edge recipe show clip-rd > mine.yaml
    clip-rd-edge distill --recipe mine.yaml --data pairs.csv \\
        --teacher runs/teacher --student resnet18 -o runs/mine
    """
    import clip_rd_edge as edge

    echo(edge.recipe(name), nl=False)
