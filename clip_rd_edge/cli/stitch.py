"""`clip-rd-edge stitch`: a teacher from an image classifier and a sentence encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import GroupedCommand, PathName, completed_by, drop_none, grouped
from clip_rd_edge.utils.printable import as_word

_classifier, _text, _output = grouped("Classifier"), grouped("Text"), grouped("Output")


@click.command(
    "stitch", cls=GroupedCommand, short_help="Build a teacher from an image classifier and a sentence encoder."
)
@click.argument("classifier")
@_text(
    "--names", required=True, metavar="FILE|imagenet", shell_complete=completed_by(("imagenet",)),
    help="The names of the classes: one class per line, in the order of the classifier's outputs; ';' separates "
    "synonyms and descriptions. imagenet: the names of ImageNet's 1,000 classes.",
)  # fmt: skip
@_text(
    "--text", required=True, metavar="MODEL",
    help="The sentence encoder: all-MiniLM-L6-v2, a folder or zip archive in the layout of transformers, a name on the "
    "hub, or an open_clip model as local-dir:PATH, whose text tower is used.",
)  # fmt: skip
@_classifier(
    "--pretrained", metavar="FILE", type=PathName(path_type=str),
    help="The classifier's weights (.safetensors, .pth).  [default: from an installed package, else published ones]",
)  # fmt: skip
@_classifier(
    "--image-size", type=click.IntRange(16), metavar="PIXELS",
    help="Edge of the input images in pixels.  [default: the classifier's]",
)  # fmt: skip
@_text(
    "--context-length", type=click.IntRange(4), metavar="TOKENS",
    help="Max tokens per text.  [default: 77, or the encoder's, if fewer]",
)  # fmt: skip
@_output("-o", "--output", required=True, type=PathName(), metavar="FOLDER", help="Folder for the model.")
@_output(
    "--force", is_flag=True, help="Replace an earlier stitched model in FOLDER; a folder with anything else is refused."
)
def command(classifier: str, output: Path, names: str, text: str, force: bool, **options: Any) -> None:
    """Join CLASSIFIER and a sentence encoder through the names of the classes: zero-shot, without training images.

    \b
    clip-rd-edge stitch tf_efficientnet_lite0 --names imagenet \\
        --text all-MiniLM-L6-v2 -o teacher
    clip-rd-edge stitch resnet18 --pretrained parts.pth --names parts.txt \\
        --text all-MiniLM-L6-v2 -o parts

    CLASSIFIER is a timm architecture, or torchvision:NAME. The result is an open_clip model, such as distill takes as
    its --teacher. It knows what its classes look like, and relates other texts to them as far as their meaning does.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter, say

    with console_reporter() as reporter:
        folder = edge.stitch(
            classifier, output, names=names, text=text, force=force, reporter=reporter, **drop_none(**options)
        )
    say(f"next: clip-rd-edge export {as_word(folder)} -o {as_word(f'{folder}-bundle')}")
    echo(f"local-dir:{folder}")
