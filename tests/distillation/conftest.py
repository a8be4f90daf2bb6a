"""Tiny runs draw no plots, which would take longer than their training, unless a test asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from open_clip.tokenizer import SimpleTokenizer


@pytest.fixture(autouse=True)
def _no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("clip_rd_edge.distillation.run.plot_run", lambda *_: None)


@pytest.fixture
def plots() -> None:
    """Have runs draw their plots."""


_read_tokenizers: dict[str, dict[str, Any]] = {}
_read_tokenizer = SimpleTokenizer.__init__


def _copy_tokenizer(self: SimpleTokenizer, *args: Any, **options: Any) -> None:
    key = repr((args, sorted(options.items())))
    if key not in _read_tokenizers:
        _read_tokenizer(self, *args, **options)
        _read_tokenizers[key] = dict(vars(self))
    vars(self).update(_read_tokenizers[key], cache=dict(_read_tokenizers[key]["cache"]))


@pytest.fixture(autouse=True)
def _tokenizers_read_once() -> Iterator[None]:
    """Read open_clip's 48,894 merges once: a tenth of a tiny run's time, twice in each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimpleTokenizer, "__init__", _copy_tokenizer)
        yield
