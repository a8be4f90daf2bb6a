"""`clip-rd-edge export`: a model as a bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clip_rd_edge.cli._browser import BROWSER, require_browser, write_from_bundle
from clip_rd_edge.cli._int8 import budget_of, int8_options
from clip_rd_edge.contract.bundle import Manifest, is_bundle
from clip_rd_edge.convert.options import Fallback, Format, Precision, Via, require_via
from clip_rd_edge.convert.targets import aim_at
from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils.io import refuse_unless_free, size_bytes

if TYPE_CHECKING:
    from clip_rd_edge.convert.int8.select import Trial

_PIPED_WIDTH = 140  # columns; rich would break lines at 80 where stderr is no terminal


@click.command("export", short_help="Turn a model into a bundle for a device.")
@click.argument("model")
@click.option("--pretrained", metavar="TAG|FILE", help="Weights, where MODEL is one of open_clip's architectures.")
@click.option(
    "--format", type=click.Choice(["onnx", "openvino", "trt"]),
    help="openvino: ONNX, for OpenVINO. trt: TensorRT engines beside their ONNX; needs no GPU.  "
    "[default: the target's, else onnx]",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8"]), help="[default: the target's, else fp32]"
)
@click.option(
    "--target",
    help="A device of `clip-rd-edge devices`, such as cpu-x86 or jetson-orin, or an RTX card's capability, such as "
    "sm86: sets format and precision. browser: a page that runs the bundle in the browser alone; MODEL may be a "
    "bundle then.",
)
@click.option(
    "--via", type=click.Choice(["onnx", "torch-tensorrt"]), default="onnx", show_default=True,
    help="How TensorRT engines are built: from ONNX, or from PyTorch, on the GPU that they are for.",
)  # fmt: skip
@click.option(
    "--layout", type=click.Choice(["bundle", "immich"]), default="bundle", show_default=True,
    help="immich: the folder that immich keeps a model in; of --format onnx.",
)  # fmt: skip
@click.option("--preprocess-in-graph", is_flag=True, help="image.onnx takes uint8 RGB of any size; one at a time.")
@click.option(
    "--labels", "labels_file", type=click.Path(path_type=Path),
    help="A text file with a label a line; their embeddings travel with the bundle.",
)  # fmt: skip
@click.option(
    "--calibration", metavar="CSV|emoji",
    help="Pairs to set INT8's ranges by and to judge it by. Default: those that MODEL was trained with.",
)  # fmt: skip
@click.option(
    "--node-modules", type=click.Path(path_type=Path), metavar="DIR",
    help="Where npm has installed what --target browser needs. Default: fetched once.",
)  # fmt: skip
@int8_options
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="To measure latency with.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle's folder.")
@click.option("--force", is_flag=True, help="Replace what stands at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made, and all that was tried, as JSON.")
def command(
    model: str,
    pretrained: str | None,
    format: Format | None,
    precision: Precision | None,
    target: str | None,
    via: Via,
    layout: str,
    preprocess_in_graph: bool,
    labels_file: Path | None,
    calibration: str | None,
    node_modules: Path | None,
    min_agreement: float | None,
    max_loss: float | None,
    fallback: Fallback | None,
    threads: int,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Turn MODEL into a bundle: two ONNX files, a tokenizer and a manifest, which run without torch.

    MODEL is the folder of a run, an open_clip folder, or any model that open_clip loads. INT8 is tried in several
    ways and measured beside float32; a tower that it makes neither faster nor, at the same speed, smaller, or too
    inaccurate, stays float32. FP16 is for size and for GPUs: on a CPU it is no faster. TensorRT engines for RTX cards
    are built on any machine; a Jetson builds its own with the bundle's build.sh.

    \b
    clip-rd-edge export runs/first --target cpu-x86 --labels labels.txt -o bundle
    clip-rd-edge export open_clip:ViT-B-32 --pretrained openai -o vit-b-32
    clip-rd-edge export runs/first --target sm89 -o bundle
    clip-rd-edge export runs/first --target jetson-orin -o bundle
    clip-rd-edge export bundle --target browser -o site
    """
    refuse_unless_free(output, overwrite=force)
    for_browser = target == BROWSER
    if is_bundle(Path(model)) and not for_browser:
        raise UsageError(f"{model} is a bundle already.", hint="give the model that it was made from")

    if for_browser:
        require_browser(
            format=format or "onnx", layout=layout, preprocess_in_graph=preprocess_in_graph, node_modules=node_modules
        )
    aim = aim_at(target, format=format, precision=precision)
    format, precision = aim.format, aim.precision
    require_via(via, format=format, precision=precision)
    budget = budget_of(
        precision=precision, format=format, min_agreement=min_agreement, max_loss=max_loss, fallback=fallback
    )
    if layout == "immich" and format != "onnx":
        raise UsageError(f"immich runs ONNX; expected --format onnx, not {format}.")

    from clip_rd_edge.cli._labels import read_labels_file
    from clip_rd_edge.cli._progress import stderr
    from clip_rd_edge.convert.calibration import calibration_pairs

    labels = read_labels_file(labels_file) if labels_file else None
    if for_browser and is_bundle(Path(model)):
        manifest = write_from_bundle(Path(model), output, labels=labels, node_modules=node_modules, overwrite=force)
        click.echo(_as_json(output, manifest, []) if as_json else output)
        return
    pairs = calibration_pairs(calibration, model) if precision == "int8" else None

    # Only now, so that what was mistyped is said at once: torch takes seconds to import.
    from clip_rd_edge.convert.calibration import calibration_set
    from clip_rd_edge.exporters.bundle import export_bundle
    from clip_rd_edge.models.encoder import TorchEncoder
    from clip_rd_edge.models.load import load_clip

    trials: list[Trial] = []
    as_bundle = layout == "bundle" and not for_browser
    with tempfile.TemporaryDirectory() as scratch, stderr.status("loading the model") as status:
        clip = load_clip(model, pretrained=pretrained)
        drawn = None
        if pairs is not None:
            status.update(f"reading pictures of {pairs.name}")
            drawn = calibration_set(pairs, preprocessing=clip.preprocessing, tokenize=TorchEncoder(clip).tokenize)
        manifest = export_bundle(
            clip,
            output if as_bundle else Path(scratch),
            precision=precision,
            format=format,
            target=aim.engine,
            via=via,
            preprocess_in_graph=preprocess_in_graph,
            calibration=drawn,
            budget=budget,
            fallback=fallback,
            labels=labels,
            provenance=_provenance(model, pretrained, target),
            overwrite=force or not as_bundle,
            threads=threads,
            progress=status.update,
            on_trials=trials.extend,
        )
        if layout == "immich":
            from clip_rd_edge.convert.immich import write_immich

            write_immich(Path(scratch), output, overwrite=force)
        elif for_browser:
            from clip_rd_edge.demo.browser import write_browser

            write_browser(Path(scratch), output, node_modules=node_modules, overwrite=force)
    _show(manifest, trials)
    click.echo(_as_json(output, manifest, trials) if as_json else output)


def _provenance(model: str, pretrained: str | None, target: str | None) -> dict[str, str]:
    from importlib.metadata import version

    packages = ("clip-rd-edge", "torch", "open_clip_torch", "onnx", "onnxruntime", "pillow")
    given = {"pretrained": pretrained, "device": target}
    return {
        "model": model,
        **{key: value for key, value in given.items() if value},
        **{package: version(package) for package in packages},
    }


def _show(manifest: Manifest, trials: Sequence[Trial]) -> None:
    """What was tried, and what each tower became, on stderr."""
    from rich.table import Table

    from clip_rd_edge.cli._progress import say, stderr

    if trials:
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
        stderr.print(table, width=None if stderr.is_terminal else _PIPED_WIDTH)
    for name, tower in (("image", manifest.image), ("text", manifest.text)):
        latency = f", {tower.measured.latency_ms_p50:.2f} ms" if tower.measured else ""
        say(f"{name} tower: {(tower.note or tower.precision).rstrip('.')}{latency}")


def _as_json(output: Path, manifest: Manifest, trials: Sequence[Trial]) -> str:
    import msgspec

    made = {
        "bundle": str(output),
        "precision": manifest.precision,
        "size_bytes": size_bytes(output),
        "image": manifest.image,
        "text": manifest.text,
        "trials": list(trials),
    }
    return msgspec.json.encode(made).decode()
