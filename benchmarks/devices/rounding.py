"""How INT8 weights are best rounded: the centred cosine of an image tower with float32, by the rounding of its weights.

    python -m benchmarks.devices.rounding sees/stitched -o benchmarks/results/MACHINE/rounding.json

All layers are in INT8. The emoji that the agreement is measured on are not those of the calibration.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnx

from benchmarks.publishing import here_and_now, write_record
from clip_rd_edge.data import emoji
from clip_rd_edge.exporting.calibration import calibration_set
from clip_rd_edge.exporting.graph import prepare_for_quantization
from clip_rd_edge.exporting.int8.methods import StaticQuantizer
from clip_rd_edge.exporting.int8.rounding import RoundedLayers
from clip_rd_edge.exporting.int8.saturation import MAX_WEIGHT
from clip_rd_edge.exporting.parity import agreement, embed
from clip_rd_edge.exporting.towers import export_image_tower
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.runtime.backends.onnxruntime import open_session


def cosines(model: str) -> dict[str, dict[str, float]]:
    """Return the centred cosine by rounding and range method."""
    clip = load_clip(model)
    tokenize = TorchEncoder(clip).tokenize
    samples = calibration_set(emoji.training_pairs(), preprocessing=clip.preprocessing, tokenize=tokenize)
    calibrate, held_out = samples.calibrate.pixels, samples.held_out.pixels
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_for_quantization(export_image_tower(clip, Path(folder)), Path(folder))
        reference = embed(open_session(str(prepared)), held_out)
        rounded = RoundedLayers(onnx.load(prepared), calibrate, max_level=MAX_WEIGHT[7])
        result: dict[str, dict[str, float]] = {}
        for name, layers in (("nearest", None), ("by what each layer sees", rounded)):
            quantizer = StaticQuantizer(prepared, calibrate, rounded=layers)
            result[name] = {}
            for method in ("percentile", "min-max"):
                embeddings = embed(open_session(quantizer.quantize(method, quantizer.layers)), held_out)
                result[name][method] = round(agreement(reference, embeddings).centred_cosine, 4)
        return result


def main() -> None:
    """Measure the models, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    record = {"weight_bits": 7, "models": {model: cosines(model) for model in arguments.models}}
    print(record["models"])
    write_record({**record, **here_and_now()}, arguments.output)


if __name__ == "__main__":
    main()
