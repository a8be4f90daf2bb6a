"""`clip-rd-edge evaluate`: measure zero-shot accuracy and retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_rd_edge.cli._command import command_of
from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import PathName, grouped
from clip_rd_edge.settings.measuring import Evaluate
from clip_rd_edge.utils.text import csv_row

if TYPE_CHECKING:
    from clip_rd_edge.benchmarking.metrics import Score


_output = grouped("Output")


@command_of(Evaluate, "evaluate")
@_output(
    "--confusion", type=PathName(dir_okay=False), metavar="FILE",
    help="Write the confusion matrices as CSV: one row per task, class and predicted label that occur together, with "
    "the number of images. Of files that exist, only an earlier one of these is replaced.  [default: none]",
)  # fmt: skip
@_output("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(given: dict[str, Any], confusion: Path | None, as_json: bool) -> None:
    """Measure zero-shot accuracy and retrieval of MODEL.

    \b
    clip-rd-edge evaluate bundle --task my-images/ --json
    clip-rd-edge evaluate bundle --task my-images/ --per-class --confusion all.csv
    clip-rd-edge evaluate runs/emoji --task emoji:unseen-style \\
        --task emoji:unseen-style:retrieval

    MODEL is a bundle (which needs no PyTorch), a run's folder, or any model that open_clip loads: local-dir:PATH,
    hf-hub:ORG/REPO, or an architecture with --pretrained.

    Labels are put into the data set's own prompt templates; without any, into CLIP's 80 for ImageNet. The table shows
    which were used. Accuracy depends on them: compare models with the same.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.api import load_tasks
    from clip_rd_edge.cli._console import console_reporter

    if confusion is not None:
        _require_free(confusion)
    with console_reporter() as reporter:
        # Before the model, so that a mistyped name is reported at once.
        read = {name: given[name] for name in ("templates", "csv_img_key", "csv_caption_key") if name in given}
        tasks = load_tasks(given["tasks"], **read)
        reporter.update("loading the model")
        opened = {name: given[name] for name in ("pretrained", "threads") if name in given}
        model = edge.load(given["model"], **opened)
        per_class = "per_class" in given
        scores = edge.evaluate(model, tasks, per_class=per_class or confusion is not None, reporter=reporter)
    if as_json:
        from clip_rd_edge.utils.structs import to_json

        echo(to_json({"model": model.describe(), "scores": scores}), nl=False)
    else:
        _print(scores, per_class=per_class)
    if confusion is not None:  # last: what was measured is shown even if this file cannot be written
        _write_confusion(confusion, scores)


def _print(scores: Sequence[Score], *, per_class: bool) -> None:
    from clip_rd_edge.benchmarking.metrics import ZeroShotScore
    from clip_rd_edge.benchmarking.report.text import class_table, score_tables
    from clip_rd_edge.cli._console import print_table, table_width

    for table in score_tables(scores, table_width()):
        print_table(table)
    if per_class:
        for score in scores:
            if isinstance(score, ZeroShotScore):
                print_table(class_table(score))


_COLUMNS = ("task", "class", "predicted", "images")
_FOLDER = "folder"  # a further column, if a classnames.txt names folders


def _require_free(path: Path) -> None:
    """Refuse a file that is there and is no table of confusions, before the long work."""
    from clip_rd_edge.bundle.outputs import require_output_file

    headers = tuple(f"{csv_row(*columns)}\n".encode() for columns in (_COLUMNS, (*_COLUMNS, _FOLDER)))
    require_output_file(
        path, lambda beginning: beginning.startswith(headers), what="an earlier table of confusions",
        option="{confusion}",
    )  # fmt: skip


def _write_confusion(path: Path, scores: Sequence[Score]) -> None:
    """Write the confusion matrix of each zero-shot score as rows of one CSV file."""
    from clip_rd_edge.benchmarking.metrics import ZeroShotScore
    from clip_rd_edge.utils.files import named_failures, write_text

    classes = [(score.task, row) for score in scores if isinstance(score, ZeroShotScore) for row in score.per_class]
    has_folders = any(row.folder for _, row in classes)
    rows = [
        csv_row(task, row.label, predicted, images, *([row.folder] if has_folders else []))
        for task, row in classes
        for predicted, images in row.predicted.items()
    ]
    header = csv_row(*_COLUMNS, *([_FOLDER] if has_folders else []))
    with named_failures(path, hint="choose another --confusion"):
        write_text(path, "".join(f"{row}\n" for row in (header, *rows)))
