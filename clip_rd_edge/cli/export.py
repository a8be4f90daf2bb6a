"""`clip-rd-edge export`: a model as a bundle."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import click

from clip_rd_edge.cli._models import model_folder
from clip_rd_edge.contract.files import refuse_unless_free
from clip_rd_edge.errors import InputError


@click.command("export", short_help="Turn a model into a bundle for a device.")
@click.argument("model")
@click.option("--pretrained", metavar="TAG|FILE", help="Weights, where MODEL is one of open_clip's architectures.")
@click.option("--format", "format_", type=click.Choice(["onnx"]), default="onnx", show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "int8"]), default="fp32", show_default=True)
@click.option(
    "--labels",
    "labels_file",
    type=click.Path(path_type=Path),
    help="A text file with a label a line; their embeddings travel with the bundle.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle's folder.")
@click.option("--force", is_flag=True, help="Replace what stands at the output.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="To measure latency with.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: str,
    pretrained: str | None,
    format_: str,
    precision: Literal["fp32", "int8"],
    labels_file: Path | None,
    output: Path,
    force: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Turn MODEL into a bundle: two ONNX files, a tokenizer and a manifest, which run without torch.

    MODEL is the folder of a run, an open_clip folder, or any model that open_clip loads.
    """
    refuse_unless_free(output, overwrite=force)
    labels = read_labels_file(labels_file) if labels_file else None

    from rich.console import Console

    from clip_rd_edge.exporters.bundle import export_bundle
    from clip_rd_edge.models.load import load_clip

    folder = model_folder(model)
    with Console(stderr=True).status("loading the model") as status:
        clip = load_clip(str(folder) if folder else model, pretrained=pretrained)
        manifest = export_bundle(
            clip,
            output,
            precision=precision,
            labels=labels,
            provenance=provenance(model, pretrained),
            overwrite=force,
            threads=threads,
            progress=status.update,
        )
    if as_json:
        click.echo(json.dumps({"bundle": str(output), "precision": manifest.precision}))
    else:
        click.echo(str(output))


def read_labels_file(path: Path) -> list[str]:
    """Labels, one a line; empty lines are passed over.

    Raises:
        InputError: no such file, not UTF-8, or no label in it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"Cannot read the labels {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The labels {path} are not UTF-8 text: {error.reason} at byte {error.start}.") from error
    labels = [line.strip() for line in lines if line.strip()]
    if not labels:
        raise InputError(f"{path} has no labels; expected one a line.")
    return labels


def provenance(model: str, pretrained: str | None) -> dict[str, str]:
    """What the manifest says of where the bundle comes from."""
    packages = ("clip-rd-edge", "torch", "open_clip_torch", "onnx", "onnxruntime")
    return {
        "model": model,
        **({"pretrained": pretrained} if pretrained else {}),
        **{package: version(package) for package in packages},
    }
