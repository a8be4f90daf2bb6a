"""What the guide promises has a test, and the test exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROMISES = re.findall(r"^\| (.+?) \| `(tests/\S+?)::(test_\w+)` \|$", (ROOT / "docs" / "rely.md").read_text(), re.M)


def test_every_promise_names_a_test_that_exists() -> None:
    assert len(PROMISES) > 30
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for _, file, _ in PROMISES}
    assert [name for _, file, name in PROMISES if f"\ndef {name}(" not in texts[file]] == []


def test_every_row_of_the_page_is_a_promise_with_a_test() -> None:
    tables = re.findall(
        r"^\| promise \| test \|\n\| --- \| --- \|\n((?:\| .*\n)+)", (ROOT / "docs" / "rely.md").read_text(), re.M
    )
    assert len(tables) > 3
    assert sum(table.count("\n") for table in tables) == len(PROMISES)
