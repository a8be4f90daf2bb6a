"""What teaching a bundle costs on this machine, and whether emulated processors and a browser learn the same.

    python -m benchmarks.devices.teaching everyday photos --cpu cortex-a72 \\
        -o benchmarks/results/MACHINE/teaching.json --readme benchmarks/measurements/taught.md

PHOTOS has class folders, such as those that benchmarks/training/taught.py composes in `--work`. The first five images
of eight of them teach, and the next five are asked, by `clip-rd-edge teach` and `classify --none` on one thread: here,
where they are timed, and by benchmarks/devices/emulate.py's means, whose times say nothing. The page of `export
--target browser` is taught in Chromium, with the extra [dev]; without Chromium, its row is left out.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.devices.emulate import NATIVE, PROCESSORS, environment_of, interpreter
from benchmarks.pages.screenshots import CHROMIUM, site
from benchmarks.publishing import add_output_options, here_and_now, publish
from clip_rd_edge.api.exporting import place_of
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.bundle.labels import read_labels

LABELS, SHOTS, RUNS = 8, 5, 5
BROWSER = "Chromium, WASM"
PAGE = """async ([teach, asked]) => {
    const { classify, loadChoices } = await import("./api.js");
    const image = (encoded) => new Blob([Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0))]);
    await loadChoices(() => {});
    const labels = Object.keys(teach), taught = {};
    await classify(0, labels, image(asked[0]));
    const started = performance.now();
    for (const [label, images] of Object.entries(teach)) {
        taught[label] = [];
        for (const one of images) taught[label].push((await classify(0, labels, image(one))).embedding);
    }
    await classify(0, labels, image(asked[0]), taught);
    const learnt = performance.now();
    const answers = [];
    for (const one of asked) answers.push(await classify(0, labels, image(one), taught));
    return { seconds: (learnt - started) / 1e3, answers: answers.map((one) => [one.labels, one.probabilities]) };
}"""


class Taught(NamedTuple):
    """What came of a lesson.

    Attributes:
        probabilities: of the labels in their order, by image asked; zeros where none fits.
        seconds: of the whole command in a processor, or of the page's lesson on the clock.
        peak_mb: of the command, with the emulator, or of the page's process.
        rows: the labels' embeddings; None in a browser.
    """

    probabilities: np.ndarray
    seconds: float
    peak_mb: float
    rows: np.ndarray | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach a bundle here, on emulated processors and in a browser.")
    parser.add_argument("bundle", help="for ONNX Runtime, or everyday")
    parser.add_argument("photos", type=Path, help="class folders with at least ten images each")
    parser.add_argument("--cpu", nargs="*", choices=PROCESSORS, default=["cortex-a72"])
    add_output_options(parser, "teaching")
    arguments = parser.parse_args()
    bundle = Path(place_of(arguments.bundle))
    with tempfile.TemporaryDirectory() as name:
        lesson, asked = Path(name) / "lesson", []
        folders = sorted(path for path in arguments.photos.iterdir() if path.is_dir())[:LABELS]
        for folder in folders:
            images = sorted(folder.iterdir())[: 2 * SHOTS]
            (lesson / folder.name).mkdir(parents=True)
            for image in images[:SHOTS]:
                shutil.copy(image, lesson / folder.name)
            asked += [str(image.resolve()) for image in images[SHOTS:]]
        labels = [folder.name for folder in folders]
        found = {where: taught(bundle, lesson, asked, labels, where) for where in (NATIVE, *arguments.cpu)}
        if CHROMIUM.is_file():
            found[BROWSER] = in_browser(bundle, lesson, asked, labels)
    here, truth = found[NATIVE], np.repeat(np.arange(len(labels)), len(asked) // len(labels))
    rows = {where: row(result, here, truth) for where, result in found.items()}
    record = {
        **here_and_now(),
        "bundle": bundle.name,
        "labels": len(labels),
        "images": len(labels) * SHOTS,
        "rows": rows,
    }
    publish(record, table(rows), arguments)


def taught(bundle: Path, lesson: Path, asked: list[str], labels: list[str], where: str) -> Taught:
    """Teach and classify by the commands, here several times."""
    output = lesson.with_name(f"taught-{where}")
    python, environment = [*interpreter(where), "-m", "clip_rd_edge"], environment_of(where)
    teach = [*python, "teach", str(bundle.resolve()), str(lesson), "-o", str(output), "--alone", "--threads", "1"]
    seconds, memory = [], 0.0
    for _ in range(RUNS if where == NATIVE else 1):
        process = subprocess.Popen([*teach, "--force"], env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"error: teaching on {where} exited with code {process.returncode}")
        seconds.append(usage.ru_utime + usage.ru_stime)
        memory = max(memory, usage.ru_maxrss * 1024 / 1e6)
    classify = [*python, "classify", str(output), *asked, "--none", "--json", "--threads", "1"]
    printed = subprocess.run(classify, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    answers = [json.loads(line)["predictions"] for line in printed.splitlines()]
    by_label = [{answer["label"]: answer["probability"] for answer in image} for image in answers]
    bank = read_labels(output)
    assert bank is not None
    return Taught(in_order(by_label, labels), float(np.median(seconds)), memory, bank.find(labels))


def in_order(answers: list[dict[str, float]], labels: list[str]) -> np.ndarray:
    """Return the probabilities of the first three labels of each answer, and zeros for the others."""
    first = [sorted(image.items(), key=lambda item: -item[1])[:3] for image in answers]
    return np.array([[dict(image).get(label, 0.0) for label in labels] for image in first])


def in_browser(bundle: Path, lesson: Path, asked: list[str], labels: list[str]) -> Taught:
    """Teach and classify in the worker of the exported page."""
    from playwright.sync_api import sync_playwright

    def encoded(path: Path | str) -> str:
        return base64.b64encode(Path(path).read_bytes()).decode()

    teach = {label: [encoded(path) for path in sorted((lesson / label).iterdir())] for label in labels}
    with site(bundle) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page()
        page.set_default_timeout(600_000)
        page.goto(address)
        found: dict[str, Any] = page.evaluate(PAGE, [teach, [encoded(path) for path in asked]])
        processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
        peaks = [peak_mb(process["id"]) for process in processes if process["type"] == "renderer"]
        browser.close()
    answers = [dict(zip(*answer, strict=True)) for answer in found["answers"]]
    return Taught(in_order(answers, labels), found["seconds"], max(peaks))


def peak_mb(process: int) -> float:
    """Return the peak memory of a process that still runs, on Linux."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def row(result: Taught, here: Taught, truth: np.ndarray) -> dict[str, Any]:
    first, reference = result.probabilities.argmax(axis=1), here.probabilities.argmax(axis=1)
    is_same = (first == reference) & (result.probabilities.any(axis=1) == here.probabilities.any(axis=1))
    differences = None if result.rows is None or here.rows is None else float(np.abs(result.rows - here.rows).max())
    return {
        "seconds": round(result.seconds, 2),
        "peak_mb": round(result.peak_mb),
        "top1": float(((first == truth) & result.probabilities.any(axis=1)).mean()),
        "same_answers": float(is_same.mean()),
        "max_probability_difference": float(np.abs(result.probabilities - here.probabilities).max()),
        "max_row_difference": differences,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [["where", "seconds", "peak memory, MB", "top-1, %", "same answers, %", "probabilities differ by"]]
    for where, figures in rows.items():
        seconds = f"{figures['seconds']:.1f}" if where in (NATIVE, BROWSER) else "–"
        shares = [f"{100 * figures[name]:.1f}" for name in ("top1", "same_answers")]
        difference = f"{figures['max_probability_difference']:.1g}"
        lines.append([where, seconds, str(figures["peak_mb"]), *shares, difference])
    return markdown_table(lines, left=(0,))


if __name__ == "__main__":
    main()
