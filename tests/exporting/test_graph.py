"""What the helpers of all conversions do to the process that they run in."""

from __future__ import annotations

import io
import logging
import sys
import warnings

import pytest
from support import share_in_threads

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


def test_threads_that_convert_at_once_leave_the_process_as_it_was() -> None:
    """The second one finds the silence of the first, and must not restore that."""
    before = _state()
    is_logged, output, filters = share_in_threads(silently, _state)  # type: ignore[misc]
    assert not is_logged
    assert isinstance(output, io.StringIO)
    assert filters[0][0] == "ignore"
    assert _state() == before
