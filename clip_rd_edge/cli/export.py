"""`clip-rd-edge export`: a model as a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clip_rd_edge.cli._options import GroupedCommand, given, grouped

if TYPE_CHECKING:
    from clip_rd_edge.api import ExportedBundle
    from clip_rd_edge.convert.int8.select import Trial

_what, _int8, _output = grouped("What is exported"), grouped("INT8"), grouped("Output")


@click.command("export", cls=GroupedCommand, short_help="Turn a model into a bundle for a device.")
@click.argument("model")
@_what("--pretrained", metavar="TAG|FILE", help="Weights, where MODEL is one of open_clip's architectures.")
@_what(
    "--target",
    help="A device of `clip-rd-edge devices`, such as cpu-x86 or jetson-orin, or an RTX card's capability, such as "
    "sm86: sets format and precision. browser: a page that runs the bundle in the browser alone; MODEL may be a "
    "bundle then.",
)
@_what(
    "--format", type=click.Choice(["onnx", "openvino", "trt"]),
    help="openvino: ONNX, for OpenVINO. trt: TensorRT engines beside their ONNX; needs no GPU.  "
    "[default: the target's, else onnx]",
)  # fmt: skip
@_what("--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8"]), help="[default: the target's, else fp32]")
@_what(
    "--labels", type=click.Path(path_type=Path),
    help="A text file with one label per line; their embeddings travel with the bundle.",
)  # fmt: skip
@_what("--preprocess-in-graph", is_flag=True, help="image.onnx takes uint8 RGB of any size; one image at a time.")
@_what(
    "--layout", type=click.Choice(["bundle", "immich"]), default="bundle", show_default=True,
    help="immich: the folder that immich keeps a model in; of --format onnx.",
)  # fmt: skip
@_what(
    "--via", type=click.Choice(["onnx", "torch-tensorrt"]), default="onnx", show_default=True,
    help="How TensorRT engines are built: from ONNX, or from PyTorch, on the GPU that they are for.",
)  # fmt: skip
@_what(
    "--node-modules", type=click.Path(path_type=Path), metavar="DIR",
    help="Where npm has installed what --target browser needs.  [default: fetched once]",
)  # fmt: skip
@_int8(
    "--calibration", metavar="CSV|emoji",
    help="Pairs to set INT8's ranges by and to judge it by.  [default: those that MODEL was trained with]",
)  # fmt: skip
@_int8(
    "--min-agreement", type=click.FloatRange(0, 1),
    help="Least centred cosine of INT8's embeddings with float32's.  [default: 0.99; of the text tower 0.995]",
)  # fmt: skip
@_int8(
    "--max-loss", type=click.FloatRange(0, 100), metavar="POINTS",
    help="Zero-shot accuracy that INT8 may lose on held-out pairs.  [default: 0.5]",
)  # fmt: skip
@_int8(
    "--fallback", type=click.Choice(["fp32", "fp16", "none"]),
    help="Precision of a tower that INT8 does not improve.  [default: fp32 for one tower; where INT8 improves neither, "
    "nothing is written]",
)  # fmt: skip
@_output("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle's folder.")
@_output("--force", is_flag=True, help="Replace what stands at the output.")
@_output("--threads", type=click.IntRange(1), default=1, show_default=True, help="To measure latency with.")
@_output("--json", "as_json", is_flag=True, help="Print what was made, and all that was tried, as JSON.")
def command(model: str, output: Path, as_json: bool, **options: Any) -> None:
    """Turn MODEL into a bundle: two ONNX files, a tokenizer and a manifest, which run without PyTorch.

    MODEL is the folder of a run, an open_clip folder, or any model that open_clip loads. INT8 is tried in several
    ways and measured beside float32; a tower stays float32 where INT8 makes it neither faster nor, at the same speed,
    smaller, or costs too much accuracy. FP16 is for size and for GPUs: on a CPU it is no faster. TensorRT engines for
    RTX cards are built on any machine; a Jetson builds its own with the bundle's build.sh.

    \b
    clip-rd-edge export runs/first --target cpu-x86 --labels labels.txt -o bundle
    clip-rd-edge export open_clip:ViT-B-32 --pretrained openai -o vit-b-32
    clip-rd-edge export runs/first --target sm89 -o bundle
    clip-rd-edge export runs/first --target jetson-orin -o bundle
    clip-rd-edge export bundle --target browser -o site
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter

    with console_reporter() as reporter:
        bundle = edge.export(model, output, **given(**options), reporter=reporter)
    _show(bundle)
    click.echo(_as_json(bundle) if as_json else output)


def _show(bundle: ExportedBundle) -> None:
    """What was tried, and what each tower became, on stderr."""
    from clip_rd_edge.cli._console import print_table, say, stderr

    if bundle.trials:
        print_table(_table(bundle.trials), console=stderr)
    for name, tower in bundle.manifest.towers.items():
        latency = f", {tower.measured.latency_ms_p50:.2f} ms" if tower.measured else ""
        say(f"{name} tower: {(tower.note or tower.precision).rstrip('.')}{latency}")


def _table(trials: Sequence[Trial]) -> Any:
    from rich.table import Table

    table = Table("tower", "INT8", title="tried, each beside float32", title_justify="left")
    for heading in ("latency", "centred cosine", "zero-shot", "size"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for trial in trials:
        figures = (
            f"× {trial.latency_ratio:.2f}",
            f"{trial.centred_cosine:.4f}",
            f"{0 - trial.loss_points:+.1f}",
            f"× {trial.size_ratio:.2f}",
        )
        style = "bold" if trial.verdict == "shipped" else None
        table.add_row(trial.tower, trial.name, *figures, trial.verdict, style=style)
    return table


def _as_json(bundle: ExportedBundle) -> str:
    import msgspec

    from clip_rd_edge.utils.io import size_bytes

    made = {
        "bundle": str(bundle.folder),
        "precision": bundle.manifest.precision,
        "size_bytes": size_bytes(bundle.folder),
        **bundle.manifest.towers,
        "trials": list(bundle.trials),
    }
    return msgspec.json.encode(made).decode()
