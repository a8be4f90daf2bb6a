from __future__ import annotations

from pathlib import Path

import pytest

from clip_rd_edge.web import browser as npm


@pytest.fixture
def node_modules(tmp_path: Path) -> Path:
    """Empty files where npm would have installed the packages."""
    for package in npm.PACKAGES:
        for name in package.files.values():
            path = tmp_path / "node_modules" / package.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return tmp_path / "node_modules"
