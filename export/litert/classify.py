"""Classify an image with a LiteRT bundle: needs ai-edge-litert, numpy and Pillow, and nothing of clip-rd-edge.

python3 classify.py BUNDLE IMAGE

The bundle needs fixed labels: clip-rd-edge export … --format litert --labels labels.txt
"""

import json
import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from PIL import Image, ImageOps


def preprocess(path, manifest):
    """Return pixel_values (1, 3, H, W): the shorter edge resized, the centre cropped, the channels normalised."""
    settings = manifest["preprocessing"]
    if settings.get("resize_mode", "shortest") != "shortest":
        raise SystemExit("This example only resizes the shorter edge; see docs/bundle-format.md for the other modes.")
    height, width = settings["size"]
    if height != width:
        raise SystemExit("This example only makes square images; see docs/bundle-format.md for others.")
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.has_transparency_data:  # laid on white
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    shorter = min(image.size)
    method = Image.Resampling[settings.get("interpolation", "bicubic").upper()]
    image = image.resize((width * image.width // shorter, height * image.height // shorter), method)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = (np.asarray(image, dtype=np.float32) / 255 - settings["mean"]) / settings["std"]
    return pixels.transpose(2, 0, 1)[None].astype(np.float32)


def embed(model, inputs):
    """Return the embedding, (D,)."""
    interpreter = Interpreter(model_path=str(model), num_threads=2)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], inputs)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0]


def label_embeddings(path):
    """Return the labels and their embeddings, (N, D)."""
    bank = np.load(path)
    if "levels" in bank:
        return bank["names"], bank["levels"] * bank["scales"].astype(np.float32).reshape(-1, 1)
    return bank["names"], bank["embeddings"].astype(np.float32)


def main():
    bundle, image = map(Path, sys.argv[1:])
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    names, embeddings = label_embeddings(bundle / "labels.npz")
    embedding = embed(bundle / manifest["image"]["file"], preprocess(image, manifest))
    logits = manifest["logit_scale"] * (embeddings @ embedding)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    for i in probabilities.argsort()[::-1][:5]:
        print(f"{probabilities[i]:.3f}\t{names[i]}")


if __name__ == "__main__":
    main()
