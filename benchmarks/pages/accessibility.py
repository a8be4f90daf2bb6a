"""Check the pages in Chromium and Firefox: axe-core, every control by keyboard alone, widths, light and dark.

    npm install --prefix browsers axe-core@4.14.1 puppeteer-core@24.43.1
    python -m benchmarks.pages.accessibility quickstart --packages browsers/node_modules -o accessibility.json

Pages: the demo, the export for the browser, the report of a benchmark, and the two of `serve`, its search and its
requests; each of a finished quickstart. Each is opened at every width in both colour schemes; then

- axe-core looks for violations of WCAG and of good practice in the tree that a screen reader is given;
- Tab has to reach every control, each with an outline and inside the window;
- the demo and the export are used by keys alone: files chosen, the camera, labels added and removed, models changed;
- nothing may be wider than the window.

Exit code 1 if there is anything to report. The browsers are Debian's: apt-get install chromium firefox-esr.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import clip_rd_edge as edge
from benchmarks.pages.photographs import unpacked
from benchmarks.pages.screenshots import PACKAGE, PHOTOGRAPH, demo, running, served, site

SCRIPT = Path(__file__).with_suffix(".mjs")
BROWSERS = {"chromium": "chromium", "firefox": "firefox-esr"}
WIDTHS = (390, 768, 1440)  # a phone, a tablet, a desktop; in CSS pixels
SCHEMES = ("light", "dark")
LABELS = ("a cup", "a hotel", "a castle", "a house", "a bicycle", "a cat")


@contextmanager
def pages(quickstart: Path) -> Iterator[list[dict[str, Any]]]:
    """Start what serves the pages of a quickstart, and yield each with its name and address."""
    bundles = [quickstart / "bundles" / "fp32", quickstart / "bundles" / "int8"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        image = unpacked(PACKAGE, folder) / PHOTOGRAPH
        controls = {"image": str(image), "controls": True}
        report = stack.enter_context(served(quickstart / "report"))
        index = folder / "index"
        edge.index(bundles[0], image.parent, output=index)
        server = stack.enter_context(running("serve", str(bundles[0]), str(index), "--port", "0", "--threads", "1"))
        yield [
            {"name": "demo", "url": stack.enter_context(demo(*map(str, bundles), "--labels", *LABELS)), **controls},
            {"name": "export for the browser", "url": stack.enter_context(site(bundles[-1])), **controls},
            {"name": "report", "url": f"{report}report.html"},
            {"name": "search", "url": f"{server}?q=coffee"},
            {"name": "requests", "url": f"{server}docs"},
        ]


def check(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Check the pages of a job (see accessibility.mjs) and return what was found on each."""
    process = subprocess.run(["node", str(SCRIPT)], input=json.dumps(job), stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit("error: node stopped; its own message stands above")
    findings: list[dict[str, Any]] = json.loads(process.stdout)
    return findings


def find_browsers(names: Sequence[str]) -> dict[str, str]:
    """Return the program of each browser."""
    programs = {name: shutil.which(BROWSERS[name]) for name in names}
    if missing := [BROWSERS[name] for name, program in programs.items() if program is None]:
        sys.exit(f"error: {' and '.join(missing)} not found; hint: apt-get install {' '.join(missing)}")
    return {name: program for name, program in programs.items() if program}


def summary(findings: Sequence[dict[str, Any]]) -> str:
    """Return a table with one row per page and browser."""
    lines = ["| page | browser | views | controls | problems |", "| --- | --- | ---: | ---: | ---: |"]
    for page, version in dict.fromkeys((each["page"], each["version"]) for each in findings):
        views = [each for each in findings if (each["page"], each["version"]) == (page, version)]
        controls = max(len(view["stops"]) for view in views)
        problems = sum(len(view["problems"]) for view in views)
        lines.append(f"| {page} | {version} | {len(views)} | {controls} | {problems} |")
    return "\n".join(lines)


def main() -> None:
    """Check all pages and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="the folder of a finished quickstart")
    parser.add_argument("--packages", type=Path, required=True, help="node_modules with axe-core and puppeteer-core")
    parser.add_argument("--browsers", nargs="+", choices=BROWSERS, default=list(BROWSERS))
    parser.add_argument("--pages", nargs="+", metavar="NAME", help="check only these, such as demo or report")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, metavar="PX")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("-o", "--output", type=Path, help="write what was found as JSON")
    args = parser.parse_args()
    browsers = find_browsers(args.browsers)
    with pages(args.quickstart) as shown:
        chosen = [page for page in shown if args.pages is None or page["name"] in args.pages]
        job = {"packages": str(args.packages.resolve()), "browsers": browsers, "pages": chosen}
        findings = check({**job, "widths": args.widths, "schemes": args.schemes})
    print(summary(findings))
    for view in findings:
        for problem in view["problems"]:
            print(f"{view['page']}, {view['browser']}, {view['width']} px, {view['scheme']}: {problem}")
    if args.output:
        axe = json.loads((args.packages / "axe-core" / "package.json").read_text())["version"]
        content = {"date": date.today().isoformat(), "axe_core": axe, "views": findings}
        args.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(any(view["problems"] for view in findings))


if __name__ == "__main__":
    main()
