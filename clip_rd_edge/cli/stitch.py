"""`clip-rd-edge stitch`: a teacher from an image classifier and a sentence encoder."""

from __future__ import annotations

from typing import Any

from clip_rd_edge.cli._command import command_of
from clip_rd_edge.cli._echo import echo
from clip_rd_edge.settings.modelling import Stitch
from clip_rd_edge.utils.text import as_word


@command_of(Stitch, "stitch")
def command(given: dict[str, Any]) -> None:
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
        folder = edge.stitch(**given, reporter=reporter)
    say(f"next: clip-rd-edge export {as_word(folder)} -o {as_word(f'{folder}-bundle')}")
    echo(f"local-dir:{folder}")
