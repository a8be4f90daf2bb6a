"""The option that says what a bundle computes on."""

from __future__ import annotations

import click

from clip_rd_edge.runtime.backends.providers import AUTO, DEVICES

device_option = click.option(
    "--device",
    type=click.Choice(DEVICES),
    default=AUTO,
    show_default=True,
    help="What ONNX Runtime computes on; doctor tells what there is.",
)
