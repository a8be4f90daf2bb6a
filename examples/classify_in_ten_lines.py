"""What a picture shows, from Python, without PyTorch:  python examples/classify_in_ten_lines.py bundle photo.jpg"""

import sys
from pathlib import Path

from clip_rd_edge.contract.images import open_image
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.load import load

bundle, picture = sys.argv[1:3]
classifier = ZeroShotClassifier(load(bundle), labels=["a bicycle", "a cat", "a flag", "a clock"])
for label, probability in classifier.classify([open_image(Path(picture))])[0]:
    print(f"{probability:6.1%}  {label}")
