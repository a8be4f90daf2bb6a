"""`clip-rd-edge push`: upload a model's folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from clip_rd_edge.cli._echo import echo


@click.command("push", short_help="Upload a model's folder to the Hugging Face hub.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Create the repository as private; one that exists stays as it is.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to.  [default: main]")
@click.option("--message", help="Message of the commit.")
def command(folder: Path, repo: str, private: bool, revision: str | None, message: str | None) -> None:
    """Upload FOLDER as one commit to the model repository REPO, ORG/NAME, and print its address.

    FOLDER is an export with --layout huggingface, a student, the folder of a run, or a bundle. The repository is
    created if it does not exist. The token is that of `hf auth login`, or the variable HF_TOKEN.

    \b
    clip-rd-edge export runs/first --layout huggingface -o hub
    clip-rd-edge push hub me/my-clip --private
    """
    import clip_rd_edge as edge

    echo(edge.push(folder, repo, private=private, revision=revision, message=message))
