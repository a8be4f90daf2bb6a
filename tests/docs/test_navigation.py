"""The guide's menu; `make docs` checks it too, but needs the extra [docs]."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import clip_rd_edge as edge
from clip_rd_edge.cli.main import cli
from clip_rd_edge.runtime import doctor

ROOT = Path(__file__).parents[2]


def test_the_start_page_says_what_each_extra_is_for() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `pip install '\.\[([\w,-]+)\]'` \|", text, re.MULTILINE)
    assert doctor.extras().keys() - {extra for row in rows for extra in row.split(",")} == set()


def test_every_function_stands_on_the_page_of_a_command() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "_mkdocs" / "commands.py"))["pages"](cli)
    text = "".join([*pages.values(), *(path.read_text() for path in (ROOT / "docs" / "python").glob("*.md"))])
    documented = set(re.findall(r"^::: clip_rd_edge\.(\w+)$", text, re.MULTILINE))
    assert set(edge.__all__) <= documented
    assert documented <= set(edge.__all__)
