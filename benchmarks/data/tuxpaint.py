"""Photographs with captions to try things on, made from Debian's package tuxpaint-stamps-default.

    python -m benchmarks.data.tuxpaint photos                 # fetches the package with apt-get, as any user
    python -m benchmarks.data.tuxpaint photos --deb tuxpaint-stamps-default_2025.03.31-1_all.deb

The package holds some 950 stamps for children's drawings with captions in up to 77 languages. Some 300 of them are
photographs, cut out on a transparent ground. Each is laid on varied backgrounds, in frames from 16:9 to 2:3 and of
different sizes, as photographs come from cameras. Written into the output folder:

    images/*.jpg               every composite
    pairs.csv                  their captions in English, in open_clip's columns: `--data photos/pairs.csv`
    tasks/choose, tasks/test   two zero-shot tasks, one sub-folder per label: make choices on the first, and give the
                               figures of the second; a label is in one of them, by a hash of its name
    photographs                the task `test` for `clip-rd-edge quickstart --photos photos`
    photographs-LANGUAGE       the same with the captions in German, French and Spanish as labels
    labels.txt                 all labels, one per line
    translations.json          for each label, its captions by language

The same command gives the same files. The stamps are licensed under the GPL 2: nothing of them is shipped with
clip-rd-edge.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

PACKAGE = "tuxpaint-stamps-default"
FRAMES = ((3, 2), (2, 3), (16, 9), (4, 3), (3, 4), (1, 1))  # aspect ratios of the composites, width to height
LANGUAGES = ("de", "fr", "es")
EDGES = (384, 512, 768, 1024)  # pixels of a composite's longer edge
# A photograph has a colour of its own in one of five pixels; drawings repeat theirs.
MIN_DISTINCT_COLOURS = 0.2
MIN_OPAQUE_PIXELS = 2500


@dataclass(frozen=True)
class Stamp:
    """A cut-out photograph, its caption, and the caption by language."""

    path: Path
    caption: str
    translations: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The caption without its article, its full stop, and what stands in brackets."""
        text = re.sub(r"\s*\([^)]*\)", "", self.caption).rstrip(". ")
        return re.sub(r"^(an?|the|some)\s+", "", text, flags=re.IGNORECASE).replace("/", " or ")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make photographs with captions from Debian's Tux Paint stamps.")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--deb", type=Path, help=f"the file of the package {PACKAGE}; default: fetched with apt-get")
    parser.add_argument("--views", type=int, default=3, help="composites per photograph (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists already; choose another folder")
    with tempfile.TemporaryDirectory() as scratch:
        deb = arguments.deb or fetch(Path(scratch))
        subprocess.run(["dpkg-deb", "-x", str(deb), scratch], check=True)
        stamps = [stamp for stamp in read_stamps(Path(scratch) / "usr/share/tuxpaint/stamps") if is_photograph(stamp)]
        write(stamps, arguments.output, views=arguments.views, seed=arguments.seed)
    labels = len((arguments.output / "labels.txt").read_text(encoding="utf-8").splitlines())
    print(f"{len(stamps)} photographs of {labels} labels, {arguments.views} composites each: {arguments.output}")


def fetch(folder: Path) -> Path:
    """Download the package into a folder; needs Debian or Ubuntu, and no root."""
    subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
    (deb,) = folder.glob(f"{PACKAGE}_*.deb")
    return deb


def read_stamps(root: Path) -> Iterator[Stamp]:
    """The stamps that have a caption in English, in the order of their paths."""
    for path in sorted(root.rglob("*.png")):
        text = path.with_suffix(".txt")
        if path.stem.endswith(("_mirror", "_flip")) or "cartoon" in path.parts or not text.is_file():
            continue
        first, *others = text.read_text(encoding="utf-8", errors="replace").splitlines()
        pairs = (line.partition(".utf8=") for line in others)
        yield Stamp(path, first.strip(), {language: caption.strip() for language, mark, caption in pairs if mark})


def is_photograph(stamp: Stamp) -> bool:
    """Whether the stamp is a photograph and no drawing, judged by how many distinct colours its opaque pixels have."""
    pixels = np.asarray(Image.open(stamp.path).convert("RGBA"))
    opaque = pixels[pixels[..., 3] > 200][:, :3]
    if len(opaque) < MIN_OPAQUE_PIXELS:
        return False
    return len(np.unique(opaque, axis=0)) / len(opaque) > MIN_DISTINCT_COLOURS


def write(stamps: list[Stamp], output: Path, *, views: int, seed: int) -> None:
    """Write composites, captions and tasks into a new folder."""
    images = output / "images"
    images.mkdir(parents=True)
    rows = [("filepath", "title")]
    for number, stamp in enumerate(stamps):
        name = re.sub(r"\W+", "-", stamp.path.stem).strip("-").lower()
        for view in range(views):
            rng = np.random.default_rng((seed, number, view))
            # The views of a stamp have different aspect ratios: neighbours in FRAMES.
            frame = FRAMES[(number + view) % len(FRAMES)]
            path = images / f"{number:04d}-{name}-{view}.jpg"
            compose(Image.open(stamp.path).convert("RGBA"), frame, rng).save(path, quality=90)
            rows.append((path.relative_to(output).as_posix(), stamp.caption))
            task = output / "tasks" / task_of(stamp.label) / stamp.label
            task.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, task / path.name)
    with (output / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    labels = sorted({stamp.label for stamp in stamps})
    (output / "labels.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
    write_report_tasks(stamps, output)
    translations = {stamp.label: stamp.translations for stamp in stamps}
    (output / "translations.json").write_text(json.dumps(translations, ensure_ascii=False, indent=1), encoding="utf-8")


def write_report_tasks(stamps: list[Stamp], output: Path) -> None:
    """Write the task `test` in English and other languages, which share its images, for the quickstart's report."""
    labels = sorted({stamp.label for stamp in stamps if task_of(stamp.label) == "test"})
    translations = {stamp.label: stamp.translations for stamp in stamps}
    for language in ("", *LANGUAGES):
        task = output / "-".join(filter(None, ("photographs", language)))
        task.mkdir()
        (task / "test").symlink_to(Path("..", "tasks", "test"))
        (task / "zeroshot_classification_templates.txt").write_text("{}\n")
        if language:
            # The few captions without a translation stay in English.
            names = [translations[label].get(language, label).rstrip(". ") for label in labels]
            (task / "classnames.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def task_of(label: str) -> str:
    """`choose` or `test`, by a hash of the label."""
    return ("choose", "test")[hashlib.sha256(label.encode()).digest()[0] % 2]


def compose(stamp: Image.Image, frame: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Lay a cut-out somewhere on a background of the frame's aspect ratio, at 40 to 95 % of its shorter side."""
    longer = int(rng.choice(EDGES))
    width, height = (round(longer * side / max(frame)) for side in frame)
    image = background(width, height, rng)
    stamp = stamp.crop(stamp.getbbox())
    scale = rng.uniform(0.4, 0.95) * min(width / stamp.width, height / stamp.height)
    size = (max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale)))
    stamp = stamp.resize(size, Image.Resampling.LANCZOS)
    left, top = int(rng.integers(width - size[0] + 1)), int(rng.integers(height - size[1] + 1))
    image.paste(stamp, (left, top), stamp)
    return image


def background(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A plain ground, a gradient, or blurred patches of a few colours, which might be a room or a meadow."""
    kind = rng.integers(3)
    colours = rng.integers(40, 236, size=(4, 3), dtype=np.uint8)
    if kind == 0:
        return Image.new("RGB", (width, height), tuple(colours[0].tolist()))
    if kind == 1:
        corners = Image.fromarray(colours.reshape(2, 2, 3))
        return corners.resize((width, height), Image.Resampling.BILINEAR)
    patches = Image.fromarray(rng.choice(colours, size=(6, 8)).astype(np.uint8))
    patches = patches.resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 8, size=(height, width, 1))
    noisy = np.clip(np.asarray(patches, dtype=np.float32) + grain, 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).filter(ImageFilter.GaussianBlur(1))


if __name__ == "__main__":
    main()
