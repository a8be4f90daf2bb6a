"""Compare a Core ML bundle's answers on this Mac with the exporter's: needs coremltools and numpy alone.

python3 compare.py BUNDLE

For the CPU, and for what Core ML chooses among CPU, GPU and Neural Engine: the greatest difference of an embedding's
entry, the lowest centred cosine, and the latency of one input. Ends with 1 if a tower gives wrong answers.
"""

import json
import sys
import time
from pathlib import Path

import coremltools
import numpy as np

# On the CPU in float32, no entry may differ by more; elsewhere, and in float16, the centred cosine counts.
MAX_DIFFERENCE, MIN_COSINE = 1e-4, 0.998


def inputs_of(tower, manifest, reference):
    """Return the reference inputs of a tower: pixel values (N, 3, H, W), or ids (N, T)."""
    if tower == "text":
        return reference["ids"].astype(np.int32)
    settings = manifest["preprocessing"]
    pixels = (reference["images"].astype(np.float32) / 255 - settings["mean"]) / settings["std"]
    return pixels.transpose(0, 3, 1, 2).astype(np.float32)


def embed(model, entry, inputs):
    """Return the embeddings (N, D), and the median latency in milliseconds."""
    rows, times = [], []
    for row in inputs:
        start = time.perf_counter()
        output = model.predict({entry["input_name"]: row[None]})
        times.append((time.perf_counter() - start) * 1e3)
        rows.append(output[entry["output_name"]][0])
    return np.stack(rows).astype(np.float32), float(np.median(times[1:]))


def lowest_centred_cosine(expected, rows):
    """Return the lowest cosine of two rows after subtracting each side's mean."""
    a, b = expected - expected.mean(axis=0), rows - rows.mean(axis=0)
    return float(((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def main():
    bundle = Path(sys.argv[1])
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    with np.load(bundle / "reference.npz") as arrays:
        reference = dict(arrays)
    failed = False
    for tower in ("image", "text"):
        if manifest[tower] is None:  # of a bundle exported with --no-text-tower
            continue
        entry, inputs = manifest[tower], inputs_of(tower, manifest, reference)
        expected = reference[f"{tower}_embeddings"]
        for name, units in {"CPU": "CPU_ONLY", "Core ML's choice": "ALL"}.items():
            package = str(bundle / entry["file"])
            model = coremltools.models.MLModel(package, compute_units=coremltools.ComputeUnit[units])
            rows, milliseconds = embed(model, entry, inputs)
            difference, cosine = float(np.abs(rows - expected).max()), lowest_centred_cosine(expected, rows)
            exact = entry["precision"] == "fp32" and units == "CPU_ONLY"
            right = difference <= MAX_DIFFERENCE if exact else cosine >= MIN_COSINE
            failed |= not right
            print(
                f"{tower} tower, {entry['precision']}, {name}: greatest difference {difference:.1e}, lowest centred "
                f"cosine {cosine:.5f}, {milliseconds:.2f} ms: {'right' if right else 'WRONG'}"
            )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
