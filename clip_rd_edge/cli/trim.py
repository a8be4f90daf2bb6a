"""`clip-rd-edge trim`: a smaller text tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import GroupedCommand, PathName, drop_none, grouped
from clip_rd_edge.utils.printable import as_word

_text, _output = grouped("Text"), grouped("Output")


@click.command(
    "trim", cls=GroupedCommand, short_help="Make a student's start of a model: fewer text layers and tokens."
)
@click.argument("model")
@_text(
    "--text-layers", metavar="N", type=click.IntRange(1),
    help="Keep N layers of the text tower, evenly spaced, the first and the last among them.  [default: all]",
)  # fmt: skip
@_text(
    "--vocabulary", metavar="N", type=click.IntRange(1),
    help="Keep N tokens: those that the texts have most.  [default: all]",
)  # fmt: skip
@_text(
    "--texts", metavar="FILE", type=PathName(),
    help="Texts such as the model will be given, one per line or a table, as for distill.  [default: none]",
)  # fmt: skip
@_output("-o", "--output", required=True, type=PathName(), metavar="FOLDER", help="Folder for the model.")
@_output(
    "--force", is_flag=True, help="Replace an earlier trimmed model in FOLDER; a folder with anything else is refused."
)
def command(model: str, output: Path, force: bool, **options: Any) -> None:
    """Leave out layers and tokens of MODEL's text tower, of which the tokens are the largest part.

    \b
    clip-rd-edge trim runs/seeing --text-layers 2 --vocabulary 7500 \\
        --texts nouns.txt -o runs/trimmed
    clip-rd-edge distill --texts nouns.txt --teacher runs/seeing \\
        --student runs/trimmed --batch-size 256 --lr 5e-4 -o runs/small-text

    MODEL is a run's folder or another open_clip model. The result embeds images as MODEL does, but not texts: it is
    what a student starts from, which then learns MODEL's embeddings of texts in minutes.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter, say

    with console_reporter() as reporter:
        folder = edge.trim(model, output, force=force, reporter=reporter, **drop_none(**options))
    texts = as_word(options["texts"]) if options["texts"] else "FILE"
    say(
        f"next: clip-rd-edge distill --texts {texts} --teacher {as_word(model)} --student {as_word(folder)} "
        f"--batch-size 256 --lr 5e-4 -o {as_word(f'{folder}-student')}"
    )
    echo(f"local-dir:{folder}")
