"""`clip-rd-edge export`, `teach`, `verify` and `targets`: make a bundle, teach it, check it, and for what."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import clip_rd_edge as edge
from clip_rd_edge.cli.options import COMPLETIONS, GroupedCommand, command_of, grouped
from clip_rd_edge.cli.output import echo, echo_json, note, reported
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.settings.deploying import Export, Teach, Verify
from clip_rd_edge.utils.text import as_word, one_line

if TYPE_CHECKING:
    from clip_rd_edge.api.exporting import ExportedBundle
    from clip_rd_edge.exporting.int8.trials import Trial
    from clip_rd_edge.runtime.verify import Check


@command_of(Export, "export")
@grouped("Output")("--json", "as_json", is_flag=True, help="Print the bundle and all INT8 trials as JSON.")
def export(given: dict[str, Any], as_json: bool) -> None:
    """Export MODEL as a bundle, which runs without PyTorch: two ONNX files, a tokenizer and a manifest.

    \b
    clip-rd-edge export runs/first --precision int8 --labels labels.txt -o bundle
    clip-rd-edge export runs/first --target cpu-x86 -o bundle
    clip-rd-edge export runs/first --labels labels.txt --no-text-tower -o bundle
    clip-rd-edge export MobileCLIP2-S0@dfndr2b -o mobileclip
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
    from clip_rd_edge.bundle.manifest import LABELS
    from clip_rd_edge.exporting.plan import BROWSER, BUILD_SHELL
    from clip_rd_edge.runtime.labels import parse_labels
    from clip_rd_edge.utils.paths import is_file

    output = Path(given["output"])
    bundle = reported(edge.export, **{**given, "labels": parse_labels(given.get("labels", ()))})
    for part in bundle.targets or (bundle,):
        _show(part, name=f"{part.folder.name}: " if bundle.targets else "")
    if given.get("target") != (BROWSER,) and "layout" not in given and not bundle.targets:
        labels_option = "" if is_file(output / LABELS) else ' --labels "a cat" "a dog"'
        name = as_word(output)
        use = f"classify {name} photo.jpg{labels_option}"
        if labels_option and not given.get("text_tower", True):
            use = f"index {name} photos/ -o photos.index"
        steps = f"clip-rd-edge verify {name}; clip-rd-edge {use}"
        script = output / BUILD_SHELL
        note(f"next, on the device: bash {as_word(script)}; {steps}" if is_file(script) else f"next: {steps}")
    if as_json:
        echo_json(_summary(bundle))
    else:
        echo(output)


def _show(bundle: ExportedBundle, *, name: str) -> None:
    """Print the INT8 trials and the result for each tower to stderr, after the target's name if there are several."""
    from clip_rd_edge.cli.console import print_table, stderr
    from clip_rd_edge.utils.files import size_bytes

    if bundle.trials:
        print_table(_trial_table(bundle.trials), console=stderr)
    note(f"{name}precision: {bundle.manifest.precision}, {size_bytes(bundle.folder) / 1e6:,.1f} MB")
    for kind, tower in bundle.manifest.towers.items():
        latency = f", {tower.measured.latency_ms_p50:.2f} ms" if tower.measured else ""
        note(f"{name}{kind} tower: {(tower.note or tower.precision).rstrip('.')}{latency}")


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


def _summary(bundle: ExportedBundle) -> Any:
    from clip_rd_edge.utils.files import size_bytes

    summaries: dict[str, Any] = {
        part.folder.name: {
            "bundle": str(part.folder),
            "precision": part.manifest.precision,
            "size_bytes": size_bytes(part.folder),
            **part.manifest.towers,
            "trials": list(part.trials),
        }
        for part in bundle.targets or (bundle,)
    }
    if bundle.targets:
        return {"folder": str(bundle.folder), "targets": summaries}
    return summaries[bundle.folder.name]


@command_of(Teach, "teach")
@grouped("Output")("--json", "as_json", is_flag=True, help="Print what was taught as JSON.")
def teach(given: dict[str, Any], as_json: bool) -> None:
    """Teach BUNDLE labels from a few images of each, and write the result as a new bundle.

    \b
    clip-rd-edge teach bundle my-things/ -o taught
    clip-rd-edge teach taught more-things/ -o taught-2
    clip-rd-edge teach taught-2 --forget "my mug" -o taught-3
    clip-rd-edge classify taught photo.jpg

    FOLDER has a subfolder for each label, such as my-things/my mug/1.jpg; one to fifty images of each are enough. It is
    also a folder of images of one label, or the taught.npz that the page of clip-rd-edge demo saves. No training and no
    PyTorch: the images are embedded once, and the rest is one small linear system. The bundle keeps the embeddings, so
    that more images and labels can be added later without the old ones.
    """
    lesson = reported(edge.teach, **given)
    counts = ", ".join(f"{one_line(name)} ({count})" for name, count in lesson.labels.items())
    beside = f"; {lesson.beside:,} labels beside them have texts alone" if lesson.beside else ""
    note(f"taught: {counts or 'nothing any more'}{beside}")
    if lesson.accuracy is not None and lesson.by_texts is not None:
        note(f"images left out in turn: {lesson.accuracy:.0%} get their label, {lesson.by_texts:.0%} by its text alone")
        if lesson.beside:
            note("labels with texts alone may lose to taught ones: teach these, too, or check them with evaluate")
    note(f"next: clip-rd-edge classify {as_word(given['output'])} photo.jpg")
    if as_json:
        echo_json({"bundle": str(given["output"]), "lesson": lesson})
    else:
        echo(given["output"])


@command_of(Verify, "verify")
@grouped("Output")("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
def verify(given: dict[str, Any], as_json: bool) -> None:
    """Check that the files of BUNDLE are unchanged since the export, and that both towers answer as they did there.

    \b
    clip-rd-edge verify bundle
    clip-rd-edge verify bundle --device cuda --json

    Each tower embeds the bundle's reference images or texts on this device; the embeddings must agree with the
    exporter's, as closely as the tower's precision allows. This needs no PyTorch. Exit code 0: all checks passed, 1: a
    file is damaged or missing, or a tower does not run, takes longer than the limit, runs elsewhere than it was meant
    to, or answers wrongly.
    """
    from clip_rd_edge.cli.console import console_reporter

    with console_reporter():
        checks = edge.verify(**given)
    if as_json:
        echo_json(checks)
    else:
        _print_checks(checks)
    failed = [check for check in checks if not check.passed]
    if failed:
        raise ClipRdEdgeError(
            f"The bundle {given['bundle']} failed {len(failed)} of {len(checks)} checks: "
            f"{', '.join(check.what for check in failed)}.",
            hint=next((check.hint for check in failed if check.hint), ""),
        )


def _print_checks(checks: list[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    from clip_rd_edge.cli.console import print_table

    table = Table(show_header=False)
    for check in checks:
        state = Text("ok", style="green") if check.passed else Text("failed", style="red")
        table.add_row(check.what, state, check.detail)
    print_table(table)


# The words of the column `tested` for Target.runs.
_TESTED = {"here": "yes", "nearby": "in part", "not yet": "not yet"}


@click.command("targets", cls=GroupedCommand, short_help="List the supported targets, and how to deploy to them.")
@click.argument("name", required=False, metavar="[NAME]", shell_complete=COMPLETIONS["targets"])
@grouped("Output")("--json", "as_json", is_flag=True, help="Print the targets as JSON.")
def targets(name: str | None, as_json: bool) -> None:
    """List the supported targets, or show how to deploy to the target NAME.

    \b
    clip-rd-edge targets
    clip-rd-edge targets cpu-arm
    """
    known = edge.targets(name)
    if as_json:
        echo_json(known, indented=True)
    elif name:
        from clip_rd_edge.exporting.plan import target_guide

        echo(target_guide(name), nl=False)
    else:
        from rich.table import Table
        from rich.text import Text

        from clip_rd_edge.cli.console import print_table

        table = Table("target", "description", "requirements", "tested", show_lines=True)
        for key, target in known.items():
            title = Text.assemble(f"{target.title}\n", (target.examples, "dim"))
            table.add_row(key, title, "\n".join(target.needs), _TESTED[target.runs])
        print_table(table)
        echo("How to deploy: clip-rd-edge targets NAME; what is here: clip-rd-edge doctor", err=True)
