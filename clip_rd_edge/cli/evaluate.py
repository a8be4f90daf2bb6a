"""`clip-rd-edge evaluate`: zero-shot accuracy and retrieval."""

from __future__ import annotations

import click

from clip_rd_edge.cli._options import threads_option


@click.command("evaluate")
@click.argument("model")
@click.option(
    "--task",
    "tasks",
    metavar="NAME",
    multiple=True,
    required=True,
    help="A folder of images with one sub-folder per class, a folder that CLIP_benchmark exported, a CSV or shards of "
    "captioned images, or a task of the embedded data set, such as emoji:unseen-style or "
    "emoji:unseen-style:retrieval. Repeat it for several.",
)
@click.option("--pretrained", metavar="TAG", help="For an architecture of open_clip: its weights.")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, tasks: tuple[str, ...], pretrained: str | None, threads: int | None, as_json: bool) -> None:
    """Measure zero-shot accuracy and retrieval of MODEL.

    MODEL is a bundle's folder (needs no PyTorch), a run's folder, or what open_clip loads: local-dir:PATH,
    hf-hub:ORG/REPO, or an architecture with --pretrained.

    Labels go into the data set's own templates, else into CLIP's 80 for ImageNet where open_clip is installed, else
    into "a photo of a {}."; the table says which.

    \b
    clip-rd-edge evaluate runs/emoji --task emoji:unseen-style --task emoji:unseen-style:retrieval
    clip-rd-edge evaluate bundle --task my-images/ --json
    """
    import clip_rd_edge as edge
    from clip_rd_edge.api import load_tasks
    from clip_rd_edge.cli._console import console_reporter, print_table

    loaded = load_tasks(tasks)  # before the model, so that a mistyped name is reported at once
    with console_reporter() as reporter:
        reporter.update("loading the model")
        opened = edge.load(model, pretrained=pretrained, threads=threads)
        scores = edge.evaluate(opened, loaded, reporter=reporter)
    if as_json:
        from clip_rd_edge.utils.io import to_json

        click.echo(to_json({"model": opened.describe(), "scores": scores}), nl=False)
        return
    from clip_rd_edge.benchmarking.report.text import score_tables

    for table in score_tables(scores):
        print_table(table)
