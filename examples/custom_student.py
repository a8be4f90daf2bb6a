"""Train a student with a custom architecture: any open_clip vision config, here a four-layer ViT for 96-pixel images.

python examples/custom_student.py pairs.csv local-dir:quickstart/teacher/student runs/custom
"""

import json
import sys
from pathlib import Path

import clip_rd_edge as edge

data, teacher, run = sys.argv[1:4]
student = Path(run).parent / "four_layers.json"
student.parent.mkdir(parents=True, exist_ok=True)
student.write_text(
    json.dumps(
        {
            "vision_cfg": {"layers": 4, "width": 192, "head_width": 64, "patch_size": 16},
            "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        }
    )
)
folder = edge.distill(
    data=data,
    teacher=teacher,
    student=str(student),
    image_size=96,
    text="tiny",
    batch_size=32,
    epochs=8,
    output=run,
)
print(folder / "student")
