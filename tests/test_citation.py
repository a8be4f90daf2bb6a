"""The citation file agrees with the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from clip_rd_edge import __version__

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_the_citation_names_the_packages_version_licence_and_keywords() -> None:
    import tomllib

    citation: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # required by the format
    assert citation["version"] == __version__
    assert (citation["license"], citation["keywords"]) == (project["license"], project["keywords"])
    assert project["urls"]["Changelog"].startswith(f"{citation['repository-code']}/")
