"""`clip-rd-edge evaluate`."""

from __future__ import annotations

from functools import partial

import click


@click.command()
@click.argument("model")
@click.option(
    "--task",
    "tasks",
    metavar="NAME",
    multiple=True,
    required=True,
    help="A folder of pictures in one sub-folder a class, a folder that CLIP_benchmark exported, a CSV or shards of "
    "captioned pictures, or a task of the embedded data set, such as emoji:unseen-style or "
    "emoji:unseen-style:retrieval. Repeat it for several.",
)
@click.option("--pretrained", metavar="TAG", help="For an architecture of open_clip: its weights.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads to run on. [default: every core]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, tasks: tuple[str, ...], pretrained: str | None, threads: int | None, as_json: bool) -> None:
    """Measure zero-shot accuracy and retrieval of MODEL.

    MODEL is a bundle's folder (needs no torch), a run's folder, or what open_clip loads: local-dir:PATH,
    hf-hub:ORG/REPO, or an architecture with --pretrained.

    Labels go into the data set's own templates, else into CLIP's 80 for ImageNet where open_clip is installed, else
    into "a photo of a {}."; the table says which.

    \b
    clip-rd-edge evaluate runs/emoji --task emoji:unseen-style --task emoji:unseen-style:retrieval
    clip-rd-edge evaluate bundle --task my-pictures/ --json
    """
    from clip_rd_edge.benchmark.accuracy import evaluate
    from clip_rd_edge.benchmark.report.terminal import score_tables
    from clip_rd_edge.cli._models import open_encoder
    from clip_rd_edge.cli._output import print_table, step_progress
    from clip_rd_edge.cli._templates import imagenet_templates
    from clip_rd_edge.data.tasks import load_task
    from clip_rd_edge.utils.io import to_json

    loaded = [load_task(name, fallback=imagenet_templates) for name in dict.fromkeys(tasks)]
    encoder = open_encoder(model, pretrained=pretrained, threads=threads)
    with step_progress() as report:
        scores = [evaluate(encoder, task, advance=partial(report, task.name)) for task in loaded]
    if as_json:
        click.echo(to_json({"model": encoder.describe(), "scores": scores}), nl=False)
        return
    for table in score_tables(scores):
        print_table(table)
