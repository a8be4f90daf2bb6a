"""From one folder of images per class to a bundle for a device, measured on images that the training has not seen.

python examples/class_folders.py photos/ ViT-B-16@laion400m_e32 runs/classes
"""

import os
import sys
from pathlib import Path
from typing import Any

import clip_rd_edge as edge


def main(photos: str, teacher: str, output: str, **options: Any) -> Path:
    """Train with the options of `edge.distill`, export, and compare teacher, student and bundle."""
    run = edge.distill(
        data=photos, hold_out=0.2, teacher=teacher, output=Path(output) / "run", resume=True,
        **{"student": "resnet18", "pretrained_image": "timm", "text": "teacher", "batch_size": 64, **options},
    )  # fmt: skip
    labels = [folder.name.replace("_", " ") for folder in sorted(filter(Path.is_dir, Path(photos).iterdir()))]
    bundle = edge.export(run, Path(output) / "bundle", labels=labels, text_tower=False, force=True)
    for model in (teacher, run, bundle):
        (score,) = edge.evaluate(model, run / "data" / "held-out" / "test")
        print(f"{score.top1:6.1%}  {os.fspath(model)}")
    return Path(bundle)


if __name__ == "__main__":
    main(*sys.argv[1:4])
