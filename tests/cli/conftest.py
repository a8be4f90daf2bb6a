from __future__ import annotations

from pathlib import Path

import pytest

from clip_rd_edge.exporting.layouts import browser


@pytest.fixture
def node_modules(tmp_path: Path) -> Path:
    """A node_modules folder with the required files, all empty."""
    for package in browser.PACKAGES:
        for name in package.files.values():
            path = tmp_path / "node_modules" / package.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return tmp_path / "node_modules"
