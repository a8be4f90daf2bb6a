"""What the helpers of all conversions do to the process that they run in."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from clip_rd_edge.exporting.graph import silently


def _state() -> tuple[object, ...]:
    return logging.getLogger("test").isEnabledFor(logging.WARNING), sys.stdout, [*warnings.filters]


def test_what_a_library_says_is_suppressed_and_what_it_raises_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])  # as in an application that has configured nothing yet
    before = _state()

    def convert() -> None:
        with silently():
            print("progress")
            logging.warning("on the root logger, as ONNX Runtime's quantiser does")
            warnings.warn("nothing to act on", stacklevel=1)
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        convert()
    assert capsys.readouterr() == ("", "")
    assert logging.root.handlers == []
    assert _state() == before
