"""Where a script's figures go: to a JSON file, and as a table into a Markdown file.

Imports the package when it is called: some scripts measure the memory of processes that have not.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import msgspec


def add_output_options(parser: argparse.ArgumentParser, marker: str, *, required: bool = False) -> None:
    """Add -o, and --readme for a table between the markers of this name."""
    parser.add_argument("-o", "--output", type=Path, required=required, help="JSON file to write")
    parser.add_argument(
        "--readme", type=Path, help=f"Markdown file, for the table between <!-- {marker}: begin --> and its end"
    )
    parser.set_defaults(marker=marker)


def here_and_now() -> dict[str, str]:
    """Return the machine and the date of a measurement."""
    from clip_rd_edge.utils.host import machine_name

    return {"machine": machine_name(), "date": date.today().isoformat()}


def publish(record: Any, table: str, arguments: argparse.Namespace) -> None:
    """Print the table, and write it and the record, a dict or a struct, where the options of the script say."""
    from clip_rd_edge.benchmarking.report import write_between_markers

    print(table)
    if arguments.output:
        write_record(record, arguments.output)
    if arguments.readme:
        write_between_markers(arguments.readme, arguments.marker, table)


def print_record(record: Any, output: Path | None) -> None:
    """Print a record, a dict or a struct, as JSON, and write it to `output` if that is given."""
    print(_as_json(record))
    if output:
        write_record(record, output)


def write_record(record: Any, path: Path) -> None:
    """Write a record, a dict or a struct, as JSON."""
    from clip_rd_edge.utils.files import write_text

    write_text(path, _as_json(record) + "\n")


def _as_json(record: Any) -> str:
    return json.dumps(msgspec.to_builtins(record), indent=2, ensure_ascii=False)
