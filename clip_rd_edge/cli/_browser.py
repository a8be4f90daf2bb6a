"""What `export --target browser` does beside making a bundle."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from clip_rd_edge.contract.bundle import Manifest
from clip_rd_edge.errors import UsageError

BROWSER = "browser"
_FIXED = ("pretrained", "precision", "calibration")  # what a bundle that is there already cannot be asked for


def require_browser(*, format: str, layout: str, preprocess_in_graph: bool, node_modules: Path | None) -> None:
    """Refuse what a browser does not run, and have the npm packages at hand before minutes are spent on a model.

    Raises:
        UsageError: the options do not go with a browser.
        ClipRdEdgeError: the packages cannot be had; see `demo.npm.find_packages`.
    """
    from clip_rd_edge.cli._progress import stderr
    from clip_rd_edge.demo.browser import find_packages

    for given, option in (
        (format != "onnx", f"--format {format}"),
        (layout != "bundle", f"--layout {layout}"),
        (preprocess_in_graph, "--preprocess-in-graph"),
    ):
        if given:
            raise UsageError(f"--target browser does not go with {option}.", hint=f"leave {option} away")
    with stderr.status("looking for onnxruntime-web"):
        find_packages(node_modules)


def write_from_bundle(
    bundle: Path, output: Path, *, labels: Sequence[str] | None, node_modules: Path | None, overwrite: bool
) -> Manifest:
    """Write the folder for the browser from a bundle that is there already, with a label bank where labels are given.

    Raises:
        UsageError: another precision was asked for, or the bundle is for another runtime.
    """
    from clip_rd_edge.contract.bundle import read_manifest, write_manifest
    from clip_rd_edge.demo.browser import write_browser
    from clip_rd_edge.runtime.labels import write_label_bank

    context = click.get_current_context()
    for name in _FIXED:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(
                f"{bundle} is a bundle already, which --{name} cannot change.", hint=f"leave --{name} away"
            )
    with tempfile.TemporaryDirectory() as scratch:
        if labels is not None:
            bundle = shutil.copytree(bundle, Path(scratch) / "bundle")
            manifest = read_manifest(bundle)
            write_label_bank(bundle, manifest, labels)
            write_manifest(bundle, manifest)
        return write_browser(bundle, output, node_modules=node_modules, overwrite=overwrite)
