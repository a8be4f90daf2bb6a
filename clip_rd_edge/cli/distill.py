"""`clip-rd-edge distill`: train a compact student."""

from __future__ import annotations

from typing import Any

from clip_rd_edge.cli._command import command_of
from clip_rd_edge.cli._echo import echo
from clip_rd_edge.settings.training import Distill
from clip_rd_edge.utils.text import as_word

# The first command that a reader of the README, of the guide, of the help and of the quickstart's output is shown.
OWN_DATA_EXAMPLE = """distill --data pairs.csv --batch-size 256 -o runs/first \\
      --teacher ViT-B-16 --teacher-pretrained laion400m_e32 \\
      --student resnet18 --pretrained-image timm \\
      --text 512x6 --pretrained-text teacher"""


@command_of(Distill, "distill")
def command(given: dict[str, Any]) -> None:
    """Train a compact student from a teacher and image-caption pairs.

    \b
    clip-rd-edge distill --data pairs.csv --batch-size 256 -o runs/first \\
        --teacher ViT-B-16 --teacher-pretrained laion400m_e32 \\
        --student resnet18 --pretrained-image timm \\
        --text 512x6 --pretrained-text teacher

    The student is written to RUN/student, which open_clip loads as local-dir:RUN/student.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.bundle.runs import CALIBRATION_FILE, STUDENT_FOLDER
    from clip_rd_edge.cli._console import console_reporter, first_process, say
    from clip_rd_edge.utils.paths import is_file

    with console_reporter() as reporter:
        run = edge.distill(**given, reporter=reporter)
    # A run on texts alone, or on a few pairs, has no images to calibrate INT8 with.
    calibration = "" if is_file(run / CALIBRATION_FILE) else " --calibration pairs.csv"
    say(f"next: clip-rd-edge export {as_word(run)} --precision int8{calibration} -o {as_word(run / 'bundle')}")
    if first_process:
        echo(run / STUDENT_FOLDER)
