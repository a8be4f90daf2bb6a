"""`clip-rd-edge verify`: check that a bundle is intact and runs on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clip_rd_edge.cli.options import command_of, grouped
from clip_rd_edge.cli.output import echo
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.settings.deploying import Verify

if TYPE_CHECKING:
    from clip_rd_edge.runtime.verify import Check


@command_of(Verify, "verify")
@grouped("Output")("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
def command(given: dict[str, Any], as_json: bool) -> None:
    """Check that the files of BUNDLE are unchanged since the export, and that both towers answer as they did there.

    \b
    clip-rd-edge verify bundle
    clip-rd-edge verify bundle --device cuda --json

    Each tower embeds the bundle's reference images or texts on this device; the embeddings must agree with the
    exporter's, as closely as the tower's precision allows. This needs no PyTorch. Exit code 0: all checks passed, 1: a
    file is damaged or missing, or a tower does not run, takes longer than the limit, runs elsewhere than it was meant
    to, or answers wrongly.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli.console import console_reporter

    with console_reporter():
        checks = edge.verify(**given)
    if as_json:
        from clip_rd_edge.utils.structs import encode_json

        echo(encode_json(checks))
    else:
        _print(checks)
    failed = [check for check in checks if not check.passed]
    if failed:
        raise ClipRdEdgeError(
            f"The bundle {given['bundle']} failed {len(failed)} of {len(checks)} checks: "
            f"{', '.join(check.what for check in failed)}.",
            hint=next((check.hint for check in failed if check.hint), ""),
        )


def _print(checks: list[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    from clip_rd_edge.cli.console import print_table

    table = Table(show_header=False)
    for check in checks:
        state = Text("ok", style="green") if check.passed else Text("failed", style="red")
        table.add_row(check.what, state, check.detail)
    print_table(table)
