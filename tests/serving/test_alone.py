"""`export --target browser` in Chromium, which has access to nothing but the exported folder.

To measure a bundle of your own:

    CLIP_RD_EDGE_BUNDLE=quickstart/bundles/int8 pytest tests/serving/test_alone.py -k match_those_of_the_runtime -s
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.labels import LabelBank, write_labels
from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
from clip_rd_edge.bundle.preprocess import preprocess
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporting.layouts.browser import find_packages, write_browser
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.load import load

from .conftest import image_bytes as encode
from .conftest import to_base64, wait_for_lead

pytestmark = [pytest.mark.browser, pytest.mark.slow]
RED, BLUE = (230, 20, 20), (20, 20, 230)
IMAGE_COUNT, WARM_UP = 50, 5
Site = Callable[..., Any]
# The headers that a browser requires for multithreading.
ISOLATION_HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
CLASSIFY = """async ([encoded, labels]) => {
    const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
    const { classify } = await import("./api.js");
    return classify(0, labels, new Blob([bytes]));
}"""


@pytest.fixture
def site(open_page: Callable[..., Any], serve: Callable[..., str], tmp_path: Path) -> Site:
    """Return a function that exports a bundle, serves the folder and opens the page."""
    try:
        find_packages()
    except ClipRdEdgeError as error:
        pytest.skip(str(error))

    def open_site(bundle: Path, *, headers: Mapping[str, str] | None = None) -> Any:
        write_browser(bundle, tmp_path / "site")
        return open_page(serve(tmp_path / "site", headers))

    return open_site


@pytest.fixture(scope="module")
def student_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle in CLIP_RD_EDGE_BUNDLE, or a random student with a logit scale that separates probabilities."""
    if path := os.environ.get("CLIP_RD_EDGE_BUNDLE"):
        return Path(path)
    pytest.importorskip("open_clip")
    import msgspec

    from clip_rd_edge.exporting.bundle import export_bundle
    from clip_rd_edge.models.students import build_student, student_config

    config = student_config("resnet10t", embedding_size=64, image_size=64, text="64x1", context_length=16)
    bundle = tmp_path_factory.mktemp("student") / "bundle"
    manifest = export_bundle(build_student(config, name="random"), bundle, Plan(precision="fp32")).manifest
    write_manifest(bundle, msgspec.structs.replace(manifest, logit_scale=100.0))
    return bundle


@pytest.mark.parametrize("threads", [False, True])
def test_predictions_match_those_of_the_runtime(site: Site, student_bundle: Path, threads: bool) -> None:
    emoji = pytest.importorskip("clip_rd_edge.data.emoji")
    task = emoji.zero_shot_task("unseen style")
    paths = task.images[:IMAGE_COUNT]
    labels = [f"{name}, drawn" for name in task.labels]  # not in any label bank, so that both towers run
    page = site(student_bundle, headers=ISOLATION_HEADERS if threads else None)
    page.evaluate(CLASSIFY, [to_base64(paths[0].read_bytes()), labels])
    page.context.set_offline(True)
    contents = [to_base64(path.read_bytes()) for path in (*paths[:WARM_UP], *paths)]
    results = [page.evaluate(CLASSIFY, [content, labels]) for content in contents][WARM_UP:]
    by_label = [dict(zip(result["labels"], result["probabilities"], strict=True)) for result in results]
    encoder = load(student_bundle, threads=1)
    expected = ZeroShotClassifier(encoder, labels).probabilities([open_image(path) for path in paths])
    probabilities = np.asarray([[row[label] for label in labels] for row in by_label])
    difference = float(np.abs(probabilities - expected).max())
    assert expected.max(1).min() > 2 / len(labels)  # otherwise the comparison would mean little
    print(
        json.dumps(
            {
                "runs_on": page.locator("#bundles th").first.inner_text().strip(),
                "largest_difference": difference,
                "model_ms_p50": statistics.median(result["model_ms"] for result in results),
                "total_ms_p50": statistics.median(result["elapsed_ms"] for result in results),
                "python_model_ms_p50": python_ms(encoder, paths),
            }
        )
    )
    assert (probabilities.argmax(1) == expected.argmax(1)).all()
    # INT8 rounds: if two sums differ in the last bit, a value may fall on the next level.
    assert difference < (1e-3 if encoder.manifest.precision == "fp32" else 2e-2)


def python_ms(encoder: Any, paths: tuple[Path, ...]) -> float:
    """Return the median time of the image tower per image with one thread, in ms."""
    times = []
    for path in paths:
        pixels = preprocess(open_image(path), encoder.manifest.preprocessing)[None]
        started = perf_counter()
        encoder.encode_pixels(pixels)
        times.append((perf_counter() - started) * 1e3)
    return statistics.median(times)


def test_the_page_works_without_a_network(site: Site, colour_bundle: Path) -> None:
    write_labels(colour_bundle, LabelBank(("yellow", "blue"), np.asarray([[0.7, 0.7, 0], [0, 0, 1]], dtype=np.float32)))
    write_manifest(colour_bundle, read_manifest(colour_bundle))
    page = site(colour_bundle)
    assert page.locator("#bundles th").first.inner_text().strip() == "WASM, 1 thread"
    assert "Only one thread" in page.inner_text("#note")
    page.wait_for_load_state("networkidle")  # the text tower is loaded last
    page.context.set_offline(True)

    def choose(content: bytes) -> None:
        page.set_input_files("#file", {"name": "image", "mimeType": "image/png", "buffer": content})

    choose(encode(Image.new("RGB", (40, 30), BLUE), "PNG"))
    wait_for_lead(page, "blue ")
    assert page.locator("#labels .text").first.inner_text() == "blue"  # from the bank
    page.uncheck("#bank")
    for label in ("red", "blue", "蓝色 <b>"):  # not in the bank: the text tower has to embed them
        page.fill("#new", label)
        page.press("#new", "Enter")
    choose(encode(Image.new("RGBA", (40, 30), (*RED, 255)), "PNG"))
    wait_for_lead(page, "red ")
    choose(b"not an image")
    page.wait_for_function("() => document.getElementById('error').textContent.includes('browser cannot read')")
    page.click("#camera")
    wait_for_lead(page, "blue ")
    page.wait_for_function("() => document.getElementById('rate').textContent.endsWith('frames/s')")
    page.click("#camera")
    # The page's security policy also applies to workers: no code in them could send an image away.
    violation = page.evaluate(
        """() => new Promise((resolve) => {
            const code = `fetch("http://127.0.0.1:1/").then(() => postMessage("sent"), () => {});
                addEventListener("securitypolicyviolation", (event) => postMessage(event.violatedDirective));`;
            const worker = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
            worker.onmessage = ({ data }) => resolve(data);
        })"""
    )
    assert violation == "connect-src"
    page.problems[:] = [text for text in page.problems if "Content Security Policy" not in text]


def test_a_bundle_without_a_text_tower_starts_with_its_own_labels(site: Site, colours_without_text: Path) -> None:
    page = site(colours_without_text)
    assert page.inner_text("#bank-text") == "the bundle's own 3 labels; it knows no others"
    assert page.locator("#bank").is_checked()
    assert page.locator("#bank").is_disabled()
    red = encode(Image.new("RGB", (20, 20), RED), "PNG")
    page.set_input_files("#file", {"name": "image", "mimeType": "image/png", "buffer": red})
    wait_for_lead(page, "red")


def export_later(bundle: Path, site: Path) -> None:
    """Export a bundle into a site that is being served; the files are those of a later second, which HTTP can tell."""
    shutil.rmtree(site)
    write_browser(bundle, site)
    for path in site.rglob("*"):
        later = path.stat().st_mtime + 60
        os.utime(path, (later, later))


def rename_red(bundle: Path, name: str) -> None:
    write_labels(bundle, LabelBank((name, "blue"), np.asarray([[1, 0, 0], [0, 0, 1]], dtype=np.float32)))
    write_manifest(bundle, read_manifest(bundle))


def test_a_returning_visitor_gets_the_answers_of_the_newest_export(
    site: Site, colour_bundle: Path, tmp_path: Path
) -> None:
    rename_red(colour_bundle, "old red")
    page = site(colour_bundle, headers={"Cache-Control": "max-age=3600"})
    red = to_base64(encode(Image.new("RGB", (20, 20), RED), "PNG"))
    assert page.evaluate(CLASSIFY, [red, None])["labels"][0] == "old red"
    page.wait_for_load_state("networkidle")
    rename_red(colour_bundle, "new red")
    export_later(colour_bundle, tmp_path / "site")
    page.goto(page.url)
    page.wait_for_selector("#bundles tr")
    assert page.evaluate(CLASSIFY, [red, None])["labels"][0] == "new red"
