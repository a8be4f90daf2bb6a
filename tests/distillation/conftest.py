"""Tiny runs draw no plots, which would take longer than their training, unless a test asks for them."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("clip_rd_edge.distillation.run.plot_run", lambda *_: None)


@pytest.fixture
def plots() -> None:
    """Have runs draw their plots."""
