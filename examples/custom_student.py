"""A student that no preset has: any open_clip vision configuration, here a ViT of four layers for 96-pixel pictures.

python examples/custom_student.py pairs.csv local-dir:quickstart/teacher/student runs/custom
"""

import json
import subprocess
import sys
from pathlib import Path

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
command = ["clip-rd-edge", "distill", "--data", data, "--teacher", teacher, "--student", str(student), "-o", run]
subprocess.run([*command, "--image-size", "96", "--text", "tiny", "--batch-size", "32", "--epochs", "8"], check=True)
