"""Classify an image without PyTorch:  python examples/classify_in_ten_lines.py bundle photo.jpg"""

import sys

import clip_rd_edge as edge

bundle, image = sys.argv[1:3]
model = edge.load(bundle)
for label, probability in model.classify(image, labels=["a bicycle", "a cat", "a flag", "a clock"]):
    print(f"{probability:6.1%}  {label}")
