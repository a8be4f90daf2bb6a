"""`clip-rd-edge distill`: train a compact student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from clip_rd_edge.distill.config import Recipe, RunConfig
    from clip_rd_edge.distill.metrics import Progress


@click.command("distill", short_help="Train a compact student from a teacher and your pairs.")
@click.option(
    "--data",
    required=True,
    help="CSV or TSV of pictures and captions (columns filepath,title), WebDataset shards "
    "(a/{000..012}.tar::b.tar), or: emoji",
)
@click.option("--csv-img-key", "image_key", default="filepath", show_default=True, help="Column with the pictures.")
@click.option("--csv-caption-key", "caption_key", default="title", show_default=True, help="Column with the captions.")
@click.option(
    "--train-data-upsampling-factors", "weights", metavar="W::W",
    help="How often an epoch shows each source of shards, such as 1::2.",
)  # fmt: skip
@click.option("--json-caption-key", "json_key", help="Captions from this key of the shards' .json, not from .txt.")
@click.option(
    "--max-bad", type=click.FloatRange(0, 1, max_open=True), default=0.01, show_default=True,
    help="Share of the samples that may be damaged; they are passed over and counted.",
)  # fmt: skip
@click.option("--teacher", help="NAME (with --teacher-pretrained), local-dir:PATH or hf-hub:ORG/REPO, as in open_clip.")
@click.option("--teacher-pretrained", help="open_clip's tag, or a checkpoint file, for a teacher given by NAME.")
@click.option(
    "--student",
    required=True,
    help="mobilevit_xxs, resnet18, … or any timm name; a run's folder or local-dir:PATH trains a model on.",
)
@click.option("--recipe", "recipe_name", default="clip-rd", show_default=True, help="clip-rd, clip-kd, … or YAML.")
@click.option("--epochs", type=click.IntRange(1), help="Rounds over the data; default: the recipe's.")
@click.option("--steps", type=click.IntRange(1), help="Training steps, instead of epochs.")
@click.option("--batch-size", type=click.IntRange(1), help="Pairs a step; default: the recipe's.")
@click.option("--lr", "learning_rate", type=click.FloatRange(0, min_open=True), help="Peak learning rate.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), help="auto measures what is faster.")
@click.option("--image-size", type=click.IntRange(16), default=224, show_default=True, help="Edge in pixels.")
@click.option(
    "--text", default="standard", show_default=True,
    help="Size of the text tower: tiny, small, standard, or WIDTHxLAYERS such as 512x6.",
)  # fmt: skip
@click.option("--pretrained-image", metavar="timm|FILE", help="Weights the student's image trunk starts from.")
@click.option(
    "--pretrained-text", metavar="teacher|FILE",
    help="Weights the student's text tower starts from: evenly spaced layers of the teacher's or of a checkpoint's.",
)  # fmt: skip
@click.option("--context-length", type=click.IntRange(4), default=77, show_default=True, help="Tokens a caption.")
@click.option("--embedding-size", type=click.IntRange(0), default=0, help="Of the student; default: the teacher's.")
@click.option(
    "--teacher-cache",
    type=click.Path(file_okay=False),
    help="Folder for the teacher's embeddings, computed once; needs --views.",
)
@click.option(
    "--views", type=click.IntRange(0), default=0, help="Crops of each picture, again and again; default: new."
)
@click.option("--compile", is_flag=True, help="Run the student through torch.compile.")
@click.option("--gradient-checkpointing", is_flag=True, help="Compute activations twice, to save memory.")
@click.option("--ema-decay", type=click.FloatRange(0, 1, max_open=True), help="Keep a moving average, such as 0.999.")
@click.option("--accumulate", type=click.IntRange(1), default=1, help="Chunks a batch goes through in, to save memory.")
@click.option("--loss-block", type=click.IntRange(0), default=0, help="Pairs the loss sees together, to save memory.")
@click.option("--global-logits", is_flag=True, help="Under torchrun: each process looks at all pairs.")
@click.option("--freeze-text", is_flag=True, help="Train nothing of the text tower but its projection.")
@click.option(
    "--quantize", type=click.Choice(["int8"]),
    help="Fine-tune a trained student for INT8, briefly: 300 steps at 1e-4, unless said otherwise.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--workers", type=click.IntRange(-1), default=-1, help="Loading processes; default: half the cores.")
@click.option("--task", "tasks", multiple=True, help="Evaluate on this task (see evaluate) and keep RUN/best.")
@click.option(
    "--evaluate-every", type=click.IntRange(0), default=0, help="Steps between evaluations; default: at the end."
)
@click.option("--report-to", type=click.Choice(["tensorboard"]), help="Write the metrics there, too: RUN/tensorboard.")
@click.option("--checkpoint-every", type=click.IntRange(1), default=500, show_default=True, help="Steps.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in the output folder.")
@click.option("-o", "--output", "run", required=True, type=click.Path(path_type=Path), help="The run's folder.")
def command(run: Path, resume: bool, **options: Any) -> None:
    """Train a compact student from a teacher and your pairs.

    The student lands in RUN/student, a folder that open_clip loads as local-dir:RUN/student.

    \b
    clip-rd-edge distill --data pairs.csv --teacher ViT-B-16 --teacher-pretrained laion400m_e32 \\
        --student mobilevit_s -o runs/first
    """
    from clip_rd_edge.cli._progress import first_process, progress_bar, say
    from clip_rd_edge.distill.run import run_distillation

    config = resolve(**options)
    with progress_bar() as bar:
        task = bar.add_task("training", total=None, note="")

        def show(progress: Progress) -> None:
            note = f"loss {progress.loss:.3f}, {progress.samples_per_second:.0f} pairs/s, "
            note += f"{progress.memory_bytes / 1e9:.1f} GB"
            if progress.bad:
                note += f", {progress.bad:,} bad samples"
            bar.update(
                task, completed=progress.step, total=progress.steps,
                note=f"{note}, {progress.data_wait:.0%} waiting for data",
            )  # fmt: skip
            if progress.evaluation:
                figures = ", ".join(f"{name} {value:.1%}" for name, value in progress.evaluation.items())
                say(f"step {progress.step}: {figures}")

        def show_cache(done: int, shards: int) -> None:
            bar.update(task, completed=done, total=shards, note="shards of the teacher's cache")

        def show_index(done: int, shards: int) -> None:
            bar.update(task, completed=done, total=shards, note="shards looked through")

        folder = run_distillation(
            config,
            run,
            resume=resume,
            on_progress=show,
            on_cache=show_cache,
            on_index=show_index,
            say=say,
            evaluate=_evaluator(config),
        )
    say(f"next: clip-rd-edge export {run} --precision int8 -o {run}/bundle")
    if first_process:
        click.echo(folder)


def resolve(*, recipe_name: str, **options: Any) -> RunConfig:
    """The run that the options describe: the recipe, with what was said otherwise."""
    import msgspec

    from clip_rd_edge.distill.config import QUANTIZED, RunConfig, load_recipe

    recipe: Recipe = load_recipe(recipe_name)
    said = {
        name: value
        for name in ("epochs", "steps", "batch_size", "learning_rate", "precision", "ema_decay")
        if (value := options.pop(name)) is not None
    }
    if "epochs" in said and "steps" not in said:
        said["steps"] = 0
    if "precision" in said:
        options["teacher_precision"] = said["precision"]
    if options["quantize"]:
        said = {**QUANTIZED, **said}
    return RunConfig(recipe_name=recipe_name, recipe=msgspec.structs.replace(recipe, **said), **options)


def _evaluator(config: RunConfig) -> Any:
    if not config.tasks:
        return None
    from clip_rd_edge.benchmark.accuracy import evaluate
    from clip_rd_edge.benchmark.metrics import Score, ZeroShotScore
    from clip_rd_edge.cli._templates import imagenet_templates
    from clip_rd_edge.data.tasks import load_task

    tasks = [load_task(name, fallback=imagenet_templates) for name in config.tasks]

    def headline(score: Score) -> float:
        return score.top1 if isinstance(score, ZeroShotScore) else score.image_to_text.at1

    def figures(encoder: Any) -> dict[str, float]:
        return {task.name: headline(evaluate(encoder, task)) for task in tasks}

    return figures
