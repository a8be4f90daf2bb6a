"""`clip-rd-edge export`: export a model as a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from clip_rd_edge.bundle.formats import FORMATS, Precision
from clip_rd_edge.cli.options import (
    GroupedCommand,
    ManyOption,
    NameChoice,
    PathName,
    complete_labels,
    complete_targets,
    drop_none,
    grouped,
)
from clip_rd_edge.cli.output import echo
from clip_rd_edge.settings.training import PRECISION_WORDS
from clip_rd_edge.utils.text import as_word

if TYPE_CHECKING:
    from clip_rd_edge.api import ExportedBundle
    from clip_rd_edge.exporting.int8.search import Trial

_FORMATS = ". ".join(f"{name}: {info.help}" if info.help else name for name, info in FORMATS.items())
_bundle, _int8, _output = grouped("Bundle"), grouped("INT8"), grouped("Output")


@click.command("export", cls=GroupedCommand, short_help="Export a model as a bundle for a device.")
@click.argument("model")
@_bundle("--pretrained", metavar="TAG|FILE", help="Weights, if MODEL is an architecture of open_clip.  [default: none]")
@_bundle(
    "--target",
    metavar="NAME",
    shell_complete=complete_targets,
    help="Device to export for, which sets format and precision: one of `clip-rd-edge targets`, such as cpu-x86 or "
    "jetson-orin, or an RTX card's compute capability, such as sm86; several, as in sm86,sm89,jetson-orin, make one "
    "bundle per target. browser writes a static web page that runs the bundle in the browser; MODEL may then be a "
    "bundle.  [default: none; --format trt is then for the GPU that is here, or builds its engines where it runs]",
)
@_bundle(
    "--format", metavar="NAME",
    type=NameChoice(list(FORMATS), meant={alias: name for name, info in FORMATS.items() for alias in info.aliases}),
    help=f"{_FORMATS}.  [default: the target's, else onnx]",
)  # fmt: skip
@_bundle(
    "--precision",
    type=NameChoice(list(get_args(Precision)), meant=PRECISION_WORDS),
    metavar="NAME",
    help="Precision of the towers: fp32, fp16, bf16 or int8.  [default: the target's, else fp32]",
)
@_bundle(
    "--labels", cls=ManyOption, multiple=True, metavar="LABEL...|FILE", shell_complete=complete_labels,
    help='Labels such as "a cat" "a dog", everyday, or a label file (see classify), whose embeddings are stored in '
    "the bundle.  [default: the model's own, if it was stitched]",
)  # fmt: skip
@_bundle(
    "--text-tower/--no-text-tower", default=True,
    help="--no-text-tower leaves the text tower out, often the larger part of a bundle: it then embeds images, and "
    "classifies among the labels of --labels alone.",
)  # fmt: skip
@_bundle(
    "--preprocess-in-graph",
    is_flag=True,
    help="Preprocess in image.onnx: it takes uint8 RGB images of any size, one at a time.",
)
@_bundle(
    "--layout", type=NameChoice(["bundle", "huggingface", "immich"]), default="bundle", show_default=True,
    metavar="NAME",
    help="bundle, huggingface or immich. huggingface writes a folder that open_clip, transformers.js and fastembed "
    "load, with float32, FP16 and, with --precision int8, INT8 files and a model card. immich writes a model folder "
    "for immich.",
)  # fmt: skip
@_bundle(
    "--as", "as_name", metavar="NAME",
    help="For --layout immich: the model that immich knows by this name and whose place the student takes; its "
    "embeddings must have the same size.  [default: ViT-B-32__openai for embeddings of 512 numbers]",
)  # fmt: skip
@_bundle(
    "--report", type=PathName(), metavar="DIR",
    help="Report of `clip-rd-edge benchmark` whose figures go into the model card of --layout huggingface.  "
    "[default: none]",
)  # fmt: skip
@_bundle(
    "--via", type=NameChoice(["onnx", "torch-tensorrt"]), default="onnx", show_default=True,
    metavar="NAME",
    help="Build TensorRT engines from ONNX (onnx), or from PyTorch on the target GPU (torch-tensorrt).",
)  # fmt: skip
@_bundle(
    "--node-modules", type=PathName(), metavar="DIR",
    help="Folder where npm installed the packages for --target browser.  [default: download them once]",
)  # fmt: skip
@_int8(
    "--calibration", metavar="CSV|emoji",
    help="Pairs for calibrating and evaluating INT8.  [default: those that MODEL's run kept]",
)  # fmt: skip
@_int8(
    "--min-agreement", type=click.FloatRange(0, 1), metavar="COSINE",
    help="Min centred cosine between INT8 and float32 embeddings.  [default: 0.99; text tower: 0.995]",
)  # fmt: skip
@_int8(
    "--max-loss", type=click.FloatRange(0, 100), metavar="POINTS",
    help="Max loss of zero-shot accuracy by INT8 on held-out pairs, in percentage points.  [default: 0.5]",
)  # fmt: skip
@_int8(
    "--fallback", metavar="NAME", type=NameChoice(["fp32", "fp16", "none"]),
    help="Precision of a tower that INT8 does not improve: fp32 or fp16; none refuses the export.  "
    "[default: fp32, but if INT8 improves neither tower, the export is refused]",
)  # fmt: skip
@_output("-o", "--output", required=True, type=PathName(), metavar="FOLDER", help="Folder of the bundle.")
@_output("--force", is_flag=True, help="Replace an earlier export in FOLDER; a folder with anything else is refused.")
@_output(
    "--threads",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Threads for measuring latency.",
)
@_output("--json", "as_json", is_flag=True, help="Print the bundle and all INT8 trials as JSON.")
def command(model: str, output: Path, as_json: bool, labels: tuple[str, ...], **options: Any) -> None:
    """Export MODEL as a bundle, which runs without PyTorch: two ONNX files, a tokenizer and a manifest.

    \b
    clip-rd-edge export runs/first --precision int8 --labels labels.txt -o bundle
    clip-rd-edge export runs/first --target cpu-x86 -o bundle
    clip-rd-edge export runs/first --labels labels.txt --no-text-tower -o bundle
    clip-rd-edge export open_clip:ViT-B-32 --pretrained openai -o vit-b-32
    clip-rd-edge export runs/first --target sm89 -o bundle
    clip-rd-edge export runs/first --format trt -o bundle
    clip-rd-edge export runs/first --target coreml -o bundle
    clip-rd-edge export runs/first --target sm86,sm89,jetson-orin -o bundles
    clip-rd-edge export runs/first --layout huggingface --precision int8 -o hub
    clip-rd-edge export runs/first --layout immich --as ViT-B-32__openai -o immich
    clip-rd-edge export bundle --target browser -o site

    MODEL is a run's folder, an open_clip folder, or any model that open_clip loads. For INT8, several quantisation
    methods are tried and compared with float32; a tower stays in float32 if INT8 costs too much accuracy, or makes it
    neither faster nor, at the same speed, smaller. FP16 makes bundles smaller and suits GPUs; on a CPU it is no faster.
    TensorRT engines for RTX cards are built on any machine; a Jetson builds its own with the bundle's build.sh.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.bundle.manifest import LABELS
    from clip_rd_edge.cli.console import console_reporter, say
    from clip_rd_edge.exporting.plan import BROWSER, BUILD_SHELL
    from clip_rd_edge.runtime.labels import parse_labels
    from clip_rd_edge.utils.paths import is_file

    with console_reporter() as reporter:
        options = drop_none(labels=parse_labels(labels), **options)
        bundle = edge.export(model, output, **options, reporter=reporter)
    for part in bundle.targets or (bundle,):
        _show(part, name=f"{part.folder.name}: " if bundle.targets else "")
    if options.get("target") != BROWSER and options.get("layout") == "bundle" and not bundle.targets:
        labels_option = "" if is_file(output / LABELS) else ' --labels "a cat" "a dog"'
        name = as_word(output)
        use = f"classify {name} photo.jpg{labels_option}"
        if labels_option and not options["text_tower"]:
            use = f"index {name} photos/ -o photos.index"
        steps = f"clip-rd-edge verify {name}; clip-rd-edge {use}"
        script = output / BUILD_SHELL
        say(f"next, on the device: bash {as_word(script)}; {steps}" if is_file(script) else f"next: {steps}")
    echo(_as_json(bundle) if as_json else output)


def _show(bundle: ExportedBundle, *, name: str) -> None:
    """Print the INT8 trials and the result for each tower to stderr, after the target's name if there are several."""
    from clip_rd_edge.cli.console import print_table, say, stderr
    from clip_rd_edge.utils.files import size_bytes

    if bundle.trials:
        print_table(_trial_table(bundle.trials), console=stderr)
    say(f"{name}precision: {bundle.manifest.precision}, {size_bytes(bundle.folder) / 1e6:,.1f} MB")
    for kind, tower in bundle.manifest.towers.items():
        latency = f", {tower.measured.latency_ms_p50:.2f} ms" if tower.measured else ""
        say(f"{name}{kind} tower: {(tower.note or tower.precision).rstrip('.')}{latency}")


def _trial_table(trials: Sequence[Trial]) -> Any:
    from rich import box
    from rich.table import Table

    # 80 columns: a name or a verdict that is too long wraps, and no figure does.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="INT8 trials, relative to float32", title_justify="left")
    table.add_column("tower", no_wrap=True)
    table.add_column("INT8", overflow="fold")
    for heading in ("latency", "centred\ncosine", "zero-shot,\npoints", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for trial in trials:
        figures = (
            f"× {trial.latency_ratio:.2f}",
            f"{trial.centred_cosine:.4f}",
            "" if isnan(trial.loss_points) else f"{0 - trial.loss_points:+.1f}",
            f"× {trial.size_ratio:.2f}",
        )
        style = "bold" if trial.verdict == "shipped" else None
        shown = figures if trial.measured else [""] * len(figures)
        table.add_row(trial.tower, trial.name, *shown, trial.verdict, style=style)
    return table


def _as_json(bundle: ExportedBundle) -> str:
    from clip_rd_edge.utils.structs import encode_json

    summary = _summary(bundle)
    if bundle.targets:
        parts = {part.folder.name: _summary(part) for part in bundle.targets}
        summary = {"folder": str(bundle.folder), "targets": parts}
    return encode_json(summary).decode()


def _summary(bundle: ExportedBundle) -> dict[str, Any]:
    from clip_rd_edge.utils.files import size_bytes

    return {
        "bundle": str(bundle.folder),
        "precision": bundle.manifest.precision,
        "size_bytes": size_bytes(bundle.folder),
        **bundle.manifest.towers,
        "trials": list(bundle.trials),
    }
