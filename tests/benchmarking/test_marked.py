from __future__ import annotations

from pathlib import Path

import pytest

from clip_rd_edge.benchmarking.marked import replace_marked
from clip_rd_edge.errors import InputError


def test_only_what_is_between_the_marks_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin one (how) -->\n<!-- end one -->\nb\n<!-- begin two -->\nx\n<!-- end two -->\n")
    replace_marked(page, "two", "y\nz\n")
    replace_marked(page, "one", "1")
    expected = "a\n<!-- begin one (how) -->\n1\n<!-- end one -->\nb\n<!-- begin two -->\ny\nz\n<!-- end two -->\n"
    assert page.read_text() == expected
    replace_marked(page, "one", "1")
    assert page.read_text() == expected


@pytest.mark.parametrize("text", ["", "<!-- end one -->\n<!-- begin one -->\n", "<!-- begin one -->\n"])
def test_marks_that_do_not_pair_are_refused(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(InputError, match="'one'; expected one of each"):
        replace_marked(page, "one", "x")
    assert page.read_text() == text
    with pytest.raises(InputError, match="Cannot read"):
        replace_marked(tmp_path / "missing.md", "one", "x")
