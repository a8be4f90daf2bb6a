from __future__ import annotations

from pathlib import Path

import pytest

from clip_rd_edge.benchmarking.marks import write_between_marks
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.io import shipped


def test_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- it: begin -->\nold\n<!-- it: end -->\nafter\n")
    write_between_marks(page, "it", "| new |")
    assert page.read_text() == "before\n<!-- it: begin -->\n| new |\n<!-- it: end -->\nafter\n"
    with pytest.raises(InputError, match="no lines <!-- other: begin -->"):
        write_between_marks(page, "other", "| new |")


@pytest.mark.parametrize("name", ["towers", "peers"])
def test_the_page_of_benchmarks_has_the_marks(name: str) -> None:
    text = (shipped("benchmarks") / "README.md").read_text()
    assert text.index(f"<!-- {name}: begin -->") < text.index(f"<!-- {name}: end -->")
