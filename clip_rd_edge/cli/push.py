"""`clip-rd-edge push`: upload a model's folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import GroupedCommand, PathName, grouped

_repository = grouped("Repository")


@click.command("push", cls=GroupedCommand, short_help="Upload a model's folder to the Hugging Face hub.")
@click.argument("folder", type=PathName())
@click.argument("repo")
@_repository("--private", is_flag=True, help="Create the repository as private; one that exists stays as it is.")
@_repository("--revision", metavar="BRANCH", help="Branch to commit to.  [default: main]")
@_repository("--message", metavar="MESSAGE", help="Message of the commit.  [default: Upload FOLDER with clip-rd-edge]")
def command(folder: Path, repo: str, private: bool, revision: str | None, message: str | None) -> None:
    """Upload FOLDER as one commit to the model repository REPO, ORG/NAME, and print its address.

    \b
    clip-rd-edge export runs/first --layout huggingface -o hub
    clip-rd-edge push hub me/my-clip --private

    FOLDER is an export with --layout huggingface, a student, the folder of a run, or a bundle. The repository is
    created if it does not exist. The token is that of `hf auth login`, or the variable HF_TOKEN.
    """
    import clip_rd_edge as edge

    echo(edge.push(folder, repo, private=private, revision=revision, message=message))
