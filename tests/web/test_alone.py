"""`export --target browser` in a real Chromium that is cut off from everything but the folder.

The figures of export/browser/README.md come from here, for a bundle of one's own:

    CLIP_RD_EDGE_BUNDLE=quickstart/bundles/int8 pytest tests/web/test_alone.py -k same_answers -s
"""

from __future__ import annotations

import base64
import io
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.contract.bundle import read_manifest, write_manifest
from clip_rd_edge.contract.images import open_image
from clip_rd_edge.contract.label_bank import LabelBank, write_labels
from clip_rd_edge.contract.preprocess import preprocess
from clip_rd_edge.convert.options import ExportRequest
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.load import load
from clip_rd_edge.web.browser import find_packages, write_browser

pytestmark = [pytest.mark.browser, pytest.mark.slow]
RED, BLUE = (230, 20, 20), (20, 20, 230)
PICTURES, WARM_UP = 50, 5
Site = Callable[..., Any]
# What a browser asks for before it gives a page several threads.
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
CLASSIFY = """async ([encoded, labels]) => {
    const bytes = Uint8Array.from(atob(encoded), (each) => each.charCodeAt(0));
    const { classify } = await import("./api.js");
    return classify(0, labels, new Blob([bytes]));
}"""


@pytest.fixture
def site(open_page: Callable[..., Any], serve: Callable[..., str], tmp_path: Path) -> Site:
    """Exports a bundle, serves the folder as any static server does, and opens it."""
    try:
        find_packages()
    except ClipRdEdgeError as error:
        pytest.skip(str(error))

    def opened(bundle: Path, *, threads: bool = False) -> Any:
        write_browser(bundle, tmp_path / "site")
        camera = tmp_path / "clip.mjpeg"
        camera.write_bytes(encoded(Image.new("RGB", (320, 240), BLUE), "JPEG", quality=95) * 30)
        return open_page(serve(tmp_path / "site", ISOLATED if threads else None), camera=camera)

    return opened


@pytest.fixture(scope="module")
def student_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What CLIP_RD_EDGE_BUNDLE names, else a random student's bundle, with a scale by which probabilities differ."""
    if named := os.environ.get("CLIP_RD_EDGE_BUNDLE"):
        return Path(named)
    pytest.importorskip("open_clip")
    import msgspec

    from clip_rd_edge.exporters.bundle import export_bundle
    from clip_rd_edge.models.student import build_student, student_config

    config = student_config("resnet10t", embedding_size=64, image_size=64, text="tiny", context_length=16)
    bundle = tmp_path_factory.mktemp("student") / "bundle"
    manifest = export_bundle(build_student(config, name="random"), bundle, ExportRequest(precision="fp32")).manifest
    write_manifest(bundle, msgspec.structs.replace(manifest, logit_scale=100.0))
    return bundle


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def lead(page: Any, text: str) -> None:
    """Wait until the headline starts with `text`."""
    page.wait_for_function("(text) => document.getElementById('lead').textContent.startsWith(text)", arg=text)


@pytest.mark.parametrize("threads", [False, True])
def test_same_answers_as_the_runtime(site: Site, student_bundle: Path, threads: bool) -> None:
    emoji = pytest.importorskip("clip_rd_edge.data.emoji")
    task = emoji.zero_shot_task("unseen style")
    pictures = task.images[:PICTURES]
    labels = [f"{name}, drawn" for name in task.labels]  # that no bank has, so that both towers run
    page = site(student_bundle, threads=threads)
    page.evaluate(CLASSIFY, [text_of(pictures[0].read_bytes()), labels])
    page.context.set_offline(True)
    contents = [text_of(path.read_bytes()) for path in (*pictures[:WARM_UP], *pictures)]
    answers = [page.evaluate(CLASSIFY, [content, labels]) for content in contents][WARM_UP:]
    given = [dict(zip(each["labels"], each["probabilities"], strict=True)) for each in answers]
    encoder = load(student_bundle, threads=1)
    expected = ZeroShotClassifier(encoder, labels).probabilities([open_image(path) for path in pictures])
    probabilities = np.asarray([[each[label] for label in labels] for each in given])
    difference = float(np.abs(probabilities - expected).max())
    assert expected.max(1).min() > 2 / len(labels)  # else any answer would do
    print(
        json.dumps(
            {
                "runs_on": page.locator("#bundles th").first.inner_text().strip(),
                "largest_difference": difference,
                "model_ms_p50": statistics.median(each["model_ms"] for each in answers),
                "in_all_ms_p50": statistics.median(each["asked_ms"] for each in answers),
                "python_model_ms_p50": python_ms(encoder, pictures),
            }
        )
    )
    assert (probabilities.argmax(1) == expected.argmax(1)).all()
    # INT8 rounds: where two sums differ in the last bit, a value falls on the next level.
    assert difference < (1e-3 if encoder.manifest.precision == "fp32" else 2e-2)


def python_ms(encoder: Any, pictures: tuple[Path, ...]) -> float:
    """Median time of the image tower for a picture, one thread."""
    times = []
    for path in pictures:
        pixels = preprocess(open_image(path), encoder.manifest.preprocessing)[None]
        began = perf_counter()
        encoder.encode_pixels(pixels)
        times.append((perf_counter() - began) * 1e3)
    return statistics.median(times)


def test_the_page_without_a_network(site: Site, colour_bundle: Path) -> None:
    write_labels(colour_bundle, LabelBank(("yellow", "blue"), np.asarray([[0.7, 0.7, 0], [0, 0, 1]], dtype=np.float32)))
    write_manifest(colour_bundle, read_manifest(colour_bundle))
    page = site(colour_bundle)
    assert page.locator("#bundles th").first.inner_text().strip() == "WASM, 1 thread"
    assert "One thread only" in page.inner_text("#note")
    page.wait_for_load_state("networkidle")  # the text tower comes last
    page.context.set_offline(True)

    def choose(content: bytes) -> None:
        page.set_input_files("#file", {"name": "picture", "mimeType": "image/png", "buffer": content})

    choose(encoded(Image.new("RGB", (40, 30), BLUE), "PNG"))
    lead(page, "blue ")
    assert page.locator("#labels .text").first.inner_text() == "blue"  # of the bank
    page.uncheck("#bank")
    for label in ("red", "blue", "蓝色 <b>"):  # which the text tower has to embed
        page.fill("#new", label)
        page.press("#new", "Enter")
    choose(encoded(Image.new("RGBA", (40, 30), (*RED, 255)), "PNG"))
    lead(page, "red ")
    choose(b"no picture")
    page.wait_for_function("() => document.getElementById('error').textContent.includes('no picture that the browser')")
    page.click("#camera")
    lead(page, "blue ")
    page.wait_for_function("() => document.getElementById('rate').textContent.endsWith('frames/s')")
    page.click("#camera")
    # The worker is under the page's policy, too: even code that wanted to could not send a picture away.
    refused = page.evaluate(
        """() => new Promise((resolve) => {
            const code = `fetch("http://127.0.0.1:1/").then(() => postMessage("sent"), () => {});
                addEventListener("securitypolicyviolation", (event) => postMessage(event.violatedDirective));`;
            const worker = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
            worker.onmessage = ({ data }) => resolve(data);
        })"""
    )
    assert refused == "connect-src"
    page.complaints[:] = [text for text in page.complaints if "Content Security Policy" not in text]
