"""What mkdocs does beside rendering docs/*.md: pages taken from elsewhere, links out of the guide, and checks.

A warning fails the build, which is strict: a name of the front door without a docstring or without a page, a link to a
file that is not there, a page that would fetch something from the network.
"""

from __future__ import annotations

import inspect
import logging
import os
import posixpath
import re
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from commands import pages  # beside this file
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import clip_rd_edge as edge
from clip_rd_edge.cli.main import cli

log = logging.getLogger("mkdocs.hooks.clip_rd_edge")
ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
# What pymdownx.arithmatex leaves of $…$ and $$…$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)
# A menu in the sidebar, as far as its title.
MENU = re.compile(
    r'(<nav class="md-nav" data-md-level="\d" )aria-labelledby="\w+"'
    r"([^<]*<label[^<]*<span[^<]*</span>\s*)([^<]*?)(?=\s*</label>)"
)
MEASUREMENT = re.compile(r"\]\((measurements/[\w-]+\.md)\)")
FENCE = re.compile(r"^\s*```")
LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?(https?:)?//[^\"'\s>]+")


def borrowed_pages() -> dict[str, str]:
    """Pages that live elsewhere in the repository, as `source: page`; both paths are relative, with `/`."""
    devices = sorted(path.parent.name for path in (ROOT / "export").glob("*/README.md"))
    measured = sorted(path.name for path in (ROOT / "benchmarks" / "measurements").glob("*.md"))
    return {
        "export/README.md": "targets/index.md",
        **{f"export/{name}/README.md": f"targets/{name}.md" for name in devices},
        "examples/browser/README.md": "targets/browser-page.md",
        "benchmarks/README.md": "measurements/index.md",
        **{f"benchmarks/measurements/{name}": f"measurements/{name}" for name in measured},
    }


class OneNameEach(logging.Filter):
    """Let pass what griffe says of a single argument; of `step, total: …` it knows no argument by that name."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not re.search(r"[Pp]arameter '\w+(, \w+)+'", record.getMessage())


def on_config(config: MkDocsConfig) -> None:
    """Check the front door, and put the pages of commands and measurements into the menu."""
    logging.getLogger("mkdocs.plugins.griffe").addFilter(OneNameEach())
    written = (path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "python").glob("*.md"))
    texts = [*written, *pages(cli).values()]
    documented = set(re.findall(r"^::: clip_rd_edge\.(\w+)$", "\n".join(texts), re.MULTILINE))
    for name in edge.__all__:
        for where in undocumented(name, getattr(edge, name)):
            log.warning("clip_rd_edge.%s has no docstring", where)
        if name not in documented:
            log.warning("no page documents clip_rd_edge.%s", name)
    menus = {"Commands": [f"commands/{name}" for name in pages(cli)], "Results": results()}
    for section in config.nav or ():
        for entries in section.values():
            for entry in entries if isinstance(entries, list) else ():
                if isinstance(entry, dict):
                    entry.update((name, menus[name]) for name in entry.keys() & menus.keys())


def results() -> list[Any]:
    """The menu of the measurements: their pages by the headings of benchmarks/README.md, which links them."""
    before, *sections = re.split(
        r"^## (.+)$", (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"), flags=re.M
    )
    menu: list[Any] = ["measurements/index.md", *dict.fromkeys(MEASUREMENT.findall(before))]
    for heading, text in zip(sections[::2], sections[1::2], strict=True):
        menu.append({heading: list(dict.fromkeys(MEASUREMENT.findall(text)))})
    return menu


def undocumented(name: str, value: Any) -> list[str]:
    """The name itself and, for a class, its public methods and properties, as far as they have no docstring."""
    # Dataclasses and named tuples without one get their signature for a docstring.
    missing = [] if value.__doc__ and not value.__doc__.startswith(f"{name}(") else [name]
    if inspect.isclass(value):
        for member, attribute in vars(value).items():
            described = inspect.isfunction(attribute) or isinstance(attribute, property | classmethod | staticmethod)
            if described and not member.startswith("_") and not inspect.getdoc(attribute):
                missing.append(f"{name}.{member}")
    return missing


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages of the commands, the borrowed pages, the figures that these show, and the logo."""
    logo = ROOT / "clip_rd_edge" / "serving" / "page" / "icon.svg"
    files.append(File.generated(config, "assets/icon.svg", abs_src_path=str(logo)))
    for name, text in pages(cli).items():
        files.append(File.generated(config, f"commands/{name}", content=text))
    for source, page in borrowed_pages().items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
            if not path.startswith("docs/"):
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave a page's folder to the page that was made of their target, else to the repository."""
    sources = {made: source for source, made in borrowed_pages().items()}
    origin = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    lines, in_code = [], False
    for line in markdown.splitlines():
        in_code ^= bool(FENCE.match(line))
        lines.append(line if in_code else LINK.sub(lambda match: _redirect(match, origin, page, config, files), line))
    return "\n".join(lines)


def _redirect(match: re.Match[str], origin: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    before, target, after = match.groups()
    path, hash_mark, anchor = target.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return match.group()
    place = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
    inside = borrowed_pages().get(place) or place.removeprefix("docs/")
    if files.get_file_from_path(inside):
        path = posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or ".")
    elif (ROOT / place).exists() and not place.startswith(".."):
        kind = "tree" if (ROOT / place).is_dir() else "blob"
        path = f"{config.repo_url}/{kind}/main/{place}"
    else:
        log.warning("%s links to %s, which is not there", origin, target)
    return f"{before}{path}{hash_mark}{anchor}{after}"


def on_page_content(html: str, **_: Any) -> str:
    """Write formulas as MathML, which browsers show without scripts; as LaTeX where the converter is not installed."""
    if find_spec("latex2mathml") is None:
        return html
    from latex2mathml.converter import convert

    def shown(match: re.Match[str]) -> str:
        tag, inline, display = match.groups()
        formula: str = convert(unescape(inline or display), display="inline" if inline else "block")
        return f"<{tag} class=formula>{formula}</{tag}>"

    return FORMULA.sub(shown, html)


def on_post_page(output: str, **_: Any) -> str:
    """Name what the theme leaves without a name for screen readers: the search, and menus whose label is an icon."""
    dialog = 'data-md-component="search" role="dialog"'
    output = output.replace(dialog, f'{dialog} aria-label="Search"')
    return MENU.sub(r'\1aria-label="\3"\2\3', output)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse pages that would load something from the network: the guide works offline."""
    for folder, _, names in os.walk(config.site_dir):
        for name in names:
            if name.endswith(".html"):
                path = Path(folder) / name
                for found in LOADED.finditer(path.read_text(encoding="utf-8")):
                    if 'rel="canonical"' not in found.group() and "rel=canonical" not in found.group():
                        log.warning("%s loads from the network: %s", path.relative_to(config.site_dir), found.group())
