"""From one folder of images per class to a bundle for a device, measured on images that the training has not seen.

python examples/class_folders.py photos/ ViT-B-16@laion400m_e32 runs/classes
"""

import os
import random
import sys
from pathlib import Path
from typing import Any

import clip_rd_edge as edge

PROMPT = "a photo of a {}"


def split(photos: Path, work: Path, share: float = 0.2) -> tuple[Path, Path]:
    """Link the images of each class into two folders: one to train on, and one with `share` of them to test on."""
    for folder in sorted(filter(Path.is_dir, photos.iterdir())):
        images = sorted(folder.iterdir())
        held_back = set(random.Random(0).sample(images, max(1, round(share * len(images)))))
        for image in images:
            link = work / ("test" if image in held_back else "train") / folder.name / image.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                os.link(image, link)
    (work / "test" / "zeroshot_classification_templates.txt").write_text(f"{PROMPT}\n")
    return work / "train", work / "test"


def main(photos: str, teacher: str, output: str, **options: Any) -> Path:
    """Train with the options of `edge.distill`, export, and compare teacher, student and bundle."""
    train, test = split(Path(photos), Path(output))
    run = edge.distill(
        data=train, templates=PROMPT, teacher=teacher, output=Path(output) / "run", resume=True,
        **{"student": "resnet18", "pretrained_image": "timm", "text": "teacher", "batch_size": 64, **options},
    )  # fmt: skip
    labels = [folder.name.replace("_", " ") for folder in sorted(filter(Path.is_dir, test.iterdir()))]
    bundle = edge.export(run, Path(output) / "bundle", labels=labels, text_tower=False, force=True)
    for model in (teacher, run, bundle):
        (score,) = edge.evaluate(model, test)
        print(f"{score.top1:6.1%}  {os.fspath(model)}")
    return Path(bundle)


if __name__ == "__main__":
    main(*sys.argv[1:4])
