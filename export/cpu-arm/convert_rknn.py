"""Convert a float32 ONNX bundle for the NPU of a Rockchip board, and compare the answers in the toolkit's simulator.

python3 convert_rknn.py BUNDLE FOLDER [rk3588|rk3566|...]

Needs rknn-toolkit2, torch and "setuptools<81", and nothing of clip-rd-edge. Writes image.rknn and text.rknn in float16,
each for one input at a time; of a bundle without a text tower, image.rknn alone. Ends with 1 if a tower's lowest
centred cosine with the bundle's answers is below 0.998.
"""

import json
import sys
from pathlib import Path

import numpy as np
from rknn.api import RKNN

MIN_COSINE = 0.998


def inputs_of(tower, manifest, reference):
    """Return the reference inputs of a tower: pixel values (N, 3, H, W), or ids (N, T)."""
    if tower == "text":
        return reference["ids"].astype(np.int64)
    settings = manifest["preprocessing"]
    pixels = (reference["images"].astype(np.float32) / 255 - settings["mean"]) / settings["std"]
    return pixels.transpose(0, 3, 1, 2).astype(np.float32)


def check(code, step):
    """End the program if a step of the toolkit failed."""
    if code != 0:
        raise SystemExit(f"error: {step} ended with {code}")


def towers_of(manifest):
    """Return the towers that the bundle has, by name; end the program if the toolkit cannot convert one."""
    if manifest["target"] != "onnxruntime":
        raise SystemExit(f"error: the bundle is for {manifest['target']}; expected one of --format onnx")
    towers = {name: manifest[name] for name in ("image", "text") if manifest[name] is not None}
    for entry in towers.values():
        if entry["precision"] != "fp32":
            raise SystemExit(f"error: {entry['file']} is in {entry['precision']}; expected --precision fp32")
        if entry.get("takes_pictures"):
            raise SystemExit(f"error: {entry['file']} preprocesses images; export it without --preprocess-in-graph")
    return towers


def convert(tower, manifest, bundle, output, platform):
    """Convert a tower; return its embeddings of the reference inputs in the simulator, and those of the bundle."""
    with np.load(bundle / "reference.npz") as arrays:
        reference = dict(arrays)
    entry, inputs = manifest[tower], inputs_of(tower, manifest, reference)
    toolkit = RKNN(verbose=False)
    check(toolkit.config(target_platform=platform), "config")
    size = [[1, *inputs.shape[1:]]]
    check(
        toolkit.load_onnx(str(bundle / entry["file"]), inputs=[entry["input_name"]], input_size_list=size), "load_onnx"
    )
    check(toolkit.build(do_quantization=False), "build")
    check(toolkit.export_rknn(str(output / f"{tower}.rknn")), "export_rknn")
    check(toolkit.init_runtime(), "init_runtime")  # without a target: the simulator
    layout = ["nchw"] if tower == "image" else None
    rows = [toolkit.inference(inputs=[row[None]], data_format=layout)[0] for row in inputs]
    toolkit.release()
    return np.concatenate(rows), reference[f"{tower}_embeddings"]


def main():
    bundle, output = map(Path, sys.argv[1:3])
    platform = sys.argv[3] if len(sys.argv) > 3 else "rk3588"
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    towers = towers_of(manifest)
    output.mkdir(parents=True, exist_ok=True)
    failed = False
    for tower in towers:
        rows, expected = convert(tower, manifest, bundle, output, platform)
        a, b = expected - expected.mean(axis=0), rows - rows.mean(axis=0)
        cosine = float(((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())
        failed |= not cosine >= MIN_COSINE
        difference = float(np.abs(rows - expected).max())
        print(f"{tower} tower: greatest difference {difference:.1e}, lowest centred cosine {cosine:.6f}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
