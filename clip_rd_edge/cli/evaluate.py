"""`clip-rd-edge evaluate`: measure zero-shot accuracy and retrieval."""

from __future__ import annotations

import click

from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import threads_option


@click.command("evaluate", short_help="Measure zero-shot accuracy and retrieval of a model or bundle.")
@click.argument("model")
@click.option(
    "--task",
    "tasks",
    metavar="NAME",
    multiple=True,
    required=True,
    help="A folder of images with one subfolder per class, a data set that CLIP_benchmark exported, a CSV file or "
    "shards of images and captions, or a task of the built-in data set, such as emoji:unseen-style or "
    "emoji:unseen-style:retrieval. Can be repeated.",
)
@click.option("--pretrained", metavar="TAG", help="Weights, if MODEL is an architecture of open_clip.")
@click.option(
    "--template", "templates", multiple=True,
    help='Prompt template with {} for the label, such as "a photo of a {}", a file with one per line, or imagenet for '
    "CLIP's 80; can be repeated.  [default: the data set's, else imagenet]",
)  # fmt: skip
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(
    model: str,
    tasks: tuple[str, ...],
    pretrained: str | None,
    templates: tuple[str, ...],
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure zero-shot accuracy and retrieval of MODEL.

    MODEL is a bundle (which needs no PyTorch), a run's folder, or any model that open_clip loads: local-dir:PATH,
    hf-hub:ORG/REPO, or an architecture with --pretrained.

    Labels are put into the data set's own prompt templates; without any, into CLIP's 80 for ImageNet. The table shows
    which were used. Accuracy depends on them: compare models with the same.

    \b
    clip-rd-edge evaluate runs/emoji --task emoji:unseen-style --task emoji:unseen-style:retrieval
    clip-rd-edge evaluate bundle --task my-images/ --json
    """
    import clip_rd_edge as edge
    from clip_rd_edge.api import load_tasks
    from clip_rd_edge.cli._console import console_reporter, print_table

    # Before the model, so that a mistyped name is reported at once.
    loaded_tasks = load_tasks(tasks, templates=templates)
    with console_reporter() as reporter:
        reporter.update("loading the model")
        loaded_model = edge.load(model, pretrained=pretrained, threads=threads)
        scores = edge.evaluate(loaded_model, loaded_tasks, reporter=reporter)
    if as_json:
        from clip_rd_edge.utils.io import to_json

        echo(to_json({"model": loaded_model.describe(), "scores": scores}), nl=False)
        return
    from clip_rd_edge.benchmarking.report.text import score_tables

    for table in score_tables(scores):
        print_table(table)
