"""The demo's page in headless Chromium, whose fake camera plays a clip."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import rewrite, served

import clip_rd_edge as edge
from clip_rd_edge.bundle.labels import LabelBank, write_labels

from .conftest import image_bytes as jpeg
from .conftest import to_base64, wait_for_lead

pytest.importorskip("uvicorn")
pytestmark = pytest.mark.browser
RED, GREEN, BLUE = (230, 20, 20), (20, 230, 20), (20, 20, 230)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two bundles with the same model; the second has a label bank."""
    folder = tmp_path_factory.mktemp("bundles")
    first, second = folder / "colours", folder / "second"
    for bundle in (first, second):
        shutil.copytree("tests/corpus/good/bundle", bundle)
    write_labels(second, LabelBank(("yellow", "blue"), np.asarray([[0.7, 0.7, 0], [0, 0, 1]], dtype=np.float32)))
    rewrite(second)
    return [first, second]


@pytest.fixture(scope="module")
def url(bundles: list[Path]) -> Iterator[str]:
    """The URL of a demo that was started from the command line."""
    command = [sys.executable, "-m", "clip_rd_edge", "demo", *bundles, "--port", "0", "--threads", "1"]
    with served([*command, "--labels", "red", "green"]) as server:
        yield server.url


@pytest.fixture
def page(open_page: Callable[..., Any], url: str) -> Any:
    """The open page."""
    return open_page(url)


def send_image(page: Any, colour: tuple[int, int, int], event: str) -> None:
    """Drop or paste an image."""
    page.evaluate(
        """([encoded, event]) => {
            const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "image.jpg", { type: "image/jpeg" }));
            const init = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
            const EventType = event === "paste" ? ClipboardEvent : DragEvent;
            document.body.dispatchEvent(new EventType(event, init));
        }""",
        [to_base64(jpeg(colour)), event],
    )


def rows(page: Any) -> dict[str, str]:
    fields = page.locator("#labels input").evaluate_all("fields => fields.map((field) => field.value)")
    return dict(zip(fields, page.locator("#labels output").all_inner_texts(), strict=True))


def expect_failed_requests(page: Any, *, status: int) -> None:
    """Forget the failed requests with this status, which Chromium logs to the console; nothing else was logged."""
    assert [text for text in page.problems if str(status) not in text] == []
    page.problems.clear()


def test_images_labels_and_bundles(page: Any, bundles: list[Path]) -> None:
    send_image(page, RED, "drop")
    wait_for_lead(page, "red ")
    page.fill("#new", "blue")
    page.press("#new", "Enter")
    send_image(page, BLUE, "paste")
    wait_for_lead(page, "blue ")
    assert list(rows(page)) == ["red", "green", "blue"]
    assert rows(page)["blue"].endswith("%")
    # The bars follow edited labels.
    page.locator("#labels input").nth(2).fill("green")
    wait_for_lead(page, "red ")
    page.get_by_label("Remove red").click()
    wait_for_lead(page, "green 100")  # duplicate labels count once
    assert rows(page) == {"green": "100 %"}
    page.locator("#labels input").nth(0).fill("蓝色 blue <b>")
    wait_for_lead(page, "蓝色 blue <b>")
    # The second bundle has its own times, and an error is shown when it is removed.
    times = page.locator("#bundles tr").nth(1).locator("td").nth(2)
    assert times.inner_text() == "–"
    page.get_by_label("second").check()
    page.wait_for_function("() => document.getElementById('bundles').rows[1].cells[3].textContent.endsWith('ms')")
    # Its own labels are sorted by probability; the typed ones come back afterwards.
    page.check("#bank")
    wait_for_lead(page, "blue ")
    assert page.locator("#labels .text").first.inner_text() == "blue"
    assert not page.is_visible("#new")
    page.uncheck("#bank")
    wait_for_lead(page, "蓝色 blue <b>")
    away = bundles[1].rename(bundles[1].with_name("away"))
    send_image(page, RED, "drop")
    page.wait_for_function("() => document.getElementById('error').textContent.includes('was removed')")
    page.get_by_label("colours").check()
    page.wait_for_function("() => document.getElementById('error').textContent === ''")
    expect_failed_requests(page, status=410)
    away.rename(bundles[1])


def test_labels_are_taught_by_the_camera_and_saved(page: Any, bundles: list[Path], tmp_path: Path) -> None:
    page.fill("#new", "my sky")
    page.press("#new", "Enter")
    page.locator("#labels .teach").last.click()
    assert page.inner_text("#error") != ""  # there is no image
    page.click("#camera")
    wait_for_lead(page, "")
    page.wait_for_function("() => document.getElementById('rate').textContent")
    for count in range(1, 6):
        page.locator("#labels .teach").last.click()
        page.wait_for_function(f"() => [...document.querySelectorAll('.teach')].at(-1).textContent.endsWith('{count}')")
    wait_for_lead(page, "my sky ")
    page.click("#camera")
    page.wait_for_function("() => document.getElementById('video').hidden && document.getElementById('rate').hidden")
    assert page.inner_text("#lead").startswith("my sky ")  # its last frame stays beside its answer
    assert page.is_visible("#preview")
    send_image(page, RED, "drop")
    wait_for_lead(page, "red ")
    page.reload()
    page.wait_for_selector("#bundles tr")
    assert page.locator("#labels .taught").count() == 1
    send_image(page, BLUE, "drop")
    wait_for_lead(page, "my sky ")
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "taught.npz")
    lesson = edge.teach(bundles[1], tmp_path / "taught.npz", output=tmp_path / "taught")
    assert list(lesson.labels) == ["my sky"]
    assert edge.load(tmp_path / "taught").classify(Image.new("RGB", (9, 9), BLUE))[0].label == "my sky"


def test_several_images_and_a_folder(page: Any, tmp_path: Path) -> None:
    page.fill("#new", "blue")
    page.press("#new", "Enter")
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    (folder / "1.jpg").write_bytes(jpeg(RED))
    (folder / "more" / "2.jpg").write_bytes(jpeg(BLUE))
    for name in ("notes.txt", "raw.dng", "._1.jpg", ".trash/3.jpg", "__MACOSX/4.jpg", "@eaDir/5.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(jpeg(GREEN))
    page.set_input_files("#file", [folder / "1.jpg", folder / "more" / "2.jpg"])
    wait_for_lead(page, "red ")
    assert page.inner_text("#position") == "1 of 2: 1.jpg"
    page.click("#next")
    wait_for_lead(page, "blue ")
    page.click("#next")
    wait_for_lead(page, "red ")
    page.set_input_files("#folder", folder)
    page.wait_for_function("() => document.getElementById('position').textContent === '1 of 2: photos/1.jpg'")
    page.click("#previous")
    wait_for_lead(page, "blue ")
    assert page.inner_text("#position") == "2 of 2: photos/more/2.jpg"
    send_image(page, RED, "paste")
    wait_for_lead(page, "red ")
    assert not page.is_visible("#several")


def test_the_page_fits_a_narrow_screen(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.fill("#new", "a very long label " * 12)
    page.press("#new", "Enter")
    send_image(page, RED, "drop")
    wait_for_lead(page, "red ")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    small = page.locator("button:visible, label.button").evaluate_all(
        "buttons => buttons.filter((b) => b.getBoundingClientRect().height < 44).map((b) => b.textContent)"
    )
    assert small == []  # all are large enough for touch
