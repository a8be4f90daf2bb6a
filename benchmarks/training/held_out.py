"""Hold out a part of the built-in training pairs, to choose settings on without looking at the test splits.

    python -m benchmarks.training.held_out FOLDER

FOLDER gets pairs.csv, the pairs to train on, and two tasks: `style`, OpenMoji's images of 260 concepts of which
Twemoji's remain in the pairs, and `concepts`, both images of 130 concepts of which none remains. They are made like the
test splits, from concepts that these do not contain. Each pair has the concept's name as its caption.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import shutil
from pathlib import Path

from clip_rd_edge.data import emoji

CONCEPTS, STYLES = 130, 260


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    images = emoji.draw_images()
    training = [concept for concept in emoji.concepts() if concept.split == "training"]
    training.sort(key=lambda concept: hashlib.sha256(concept.code.encode()).digest())
    held_out = {concept.code: "concepts" for concept in training[:CONCEPTS]}
    held_out |= {concept.code: "style" for concept in training[CONCEPTS : CONCEPTS + STYLES]}
    rows = []
    for concept in emoji.concepts():
        if concept.split == "unseen concepts":
            continue
        for style in ("twemoji", "openmoji") if concept.split == "training" else ("twemoji",):
            path = images / style / f"{concept.code}.png"
            task = held_out.get(concept.code)
            if task is None or (task, style) == ("style", "twemoji"):
                rows.append((path, concept.name))
            else:
                target = folder / task / concept.name.replace("/", " ")
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / f"{style}.png")
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("filepath", "title"))
        writer.writerows(rows)
    print(f"{len(rows):,} pairs to train on")


if __name__ == "__main__":
    main()
