"""The evidence as files: one JSON that everything else is made from, tables as Markdown, figures as PNG."""

from __future__ import annotations

from pathlib import Path

import msgspec

from clip_rd_edge.benchmarking.marks import write_between_marks
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.evidence.plots import geometry_curves, learning_curves
from clip_rd_edge.evidence.results import FORMAT_VERSION, Evidence
from clip_rd_edge.evidence.tables import markdown
from clip_rd_edge.utils.io import read_versioned_json, write_bytes, write_text


def write_evidence(path: Path, evidence: Evidence) -> None:
    """Write the JSON, a run a line: indented, its curves would be thousands of lines."""
    plain = msgspec.to_builtins(evidence)
    runs = ",\n".join(msgspec.json.encode(run).decode() for run in plain.pop("runs"))
    head = msgspec.json.encode(plain).decode().removesuffix("}")
    write_text(path, f'{head},\n"runs":[\n{runs}\n]}}\n')


def read_evidence_file(path: Path) -> Evidence:
    """Read what `write_evidence` wrote.

    Raises:
        InputError: there is no such file.
        ConfigError: it is damaged, of a newer format, or has no runs.
    """
    evidence = read_versioned_json(path, Evidence, newest=FORMAT_VERSION)
    if not evidence.runs:
        raise ConfigError(f"{path} has no runs; expected one or more.", hint="run the suite again")
    return evidence


def write_report(evidence: Evidence, folder: Path) -> list[Path]:
    """Tables and figures into `folder`; returns what was written."""
    name = evidence.suite.name
    paths = [folder / f"{name}.md", folder / f"{name}-curves.png", folder / f"{name}-geometry.png"]
    write_text(paths[0], markdown(evidence) + "\n")
    write_bytes(paths[1], learning_curves(evidence))
    write_bytes(paths[2], geometry_curves(evidence))
    return paths


def publish(source: Path, page: Path) -> list[Path]:
    """Draw the figures beside the JSON `source` anew, and put its tables between the suite's marks in `page`.

    Raises:
        InputError, ConfigError: `source` or `page` does not fit.
    """
    evidence = read_evidence_file(source)
    name = evidence.suite.name
    figures = {source.with_name(f"{name}-curves.png"): learning_curves(evidence)}
    figures[source.with_name(f"{name}-geometry.png")] = geometry_curves(evidence)
    write_between_marks(page, name, markdown(evidence))
    for path, png in figures.items():
        write_bytes(path, png)
    return [page, *figures]
