"""Whether an export for this processor ships the fastest file, or says which would be: four students at 224 pixels.

    python -m benchmarks.devices.shipped WORK -o benchmarks/results/MACHINE/shipped.json \\
        --readme benchmarks/measurements/shipped.md

Image towers with random weights (the statistics of their norms are those of some images), exported in INT8 with
float32 as the fallback, and timed in turn with ONNX Runtime's FP32 and static INT8, and with OpenVINO's BF16 and INT8
(by NNCF; and the shipped file itself). Batch 1, one thread; agreement is with float32 on the held-out images. A variant
counts if it agrees as well as `export` asks for. Needs `pip install openvino nncf`. WORK keeps what is done.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import clip_rd_edge as edge
from benchmarks.devices.towers import model_of, quantize_with_nncf, samples_of
from benchmarks.publishing import add_output_options, here_and_now, publish
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.exporting.graph import prepare_for_quantization
from clip_rd_edge.exporting.int8.methods import StaticQuantizer
from clip_rd_edge.exporting.parity import agreement, embed, latencies, p10
from clip_rd_edge.exporting.plan import Budget
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.backends.openvino import open_openvino
from clip_rd_edge.utils.text import Reporter

STUDENTS, REPEATS, FASTER = ("resnet18", "mobilevit_xxs", "ViT-T/16", "mobilenetv4_conv_small"), 5, 0.91
SHIPPED, FP32 = "shipped", "ONNX Runtime, FP32"


class Notes(Reporter):
    """Keeps what an export prints about a faster or a more accurate file."""

    def __init__(self) -> None:
        self.remarks: list[str] = []

    def note(self, message: str) -> None:
        if message.startswith(("image tower", "this processor")) and "--" in message:
            self.remarks.append(message)


def measure(student: str, work: Path) -> dict[str, Any]:
    """Export a student, and time what was shipped beside the others."""
    folder = work / student.replace("/", "-")
    clip = model_of(student)
    calibrate, held_out = samples_of(clip, student)
    norms = [layer for layer in clip.model.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    for layer in norms:
        layer.momentum = None  # the mean over the batches
    with torch.no_grad():
        for start in range(0, len(calibrate), 8):
            clip.model.train().encode_image(torch.from_numpy(calibrate[start : start + 8]))
    clip.model.eval()
    save_clip(folder / "model", clip, provenance={})
    notes, model = Notes(), f"local-dir:{folder / 'model'}"
    fp32 = edge.export(model, folder / "fp32", force=True)
    bundle = edge.export(
        model, folder / "int8", precision="int8", calibration="emoji", fallback="fp32", force=True, reporter=notes
    )
    path, shipped = (each.folder / each.manifest.image.file for each in (fp32, bundle))
    quantizer = StaticQuantizer(prepare_for_quantization(path, folder), calibrate, weight_bits=7)
    (folder / "static.onnx").write_bytes(quantizer.quantize("percentile", quantizer.layers))
    quantize_with_nncf(path, calibrate, folder / "nncf.xml")
    rows: list[dict[str, Any]] = []
    for _ in range(REPEATS):
        sessions = {
            FP32: open_session(str(path), threads=1),
            SHIPPED: open_session(str(shipped), threads=1),
            "ONNX Runtime, static INT8": open_session(str(folder / "static.onnx"), threads=1),
            "OpenVINO, BF16": open_openvino(str(path), threads=1, bf16=True),
            "OpenVINO, shipped INT8": open_openvino(str(shipped), threads=1),
            "OpenVINO, NNCF's INT8": open_openvino(str(folder / "nncf.xml"), threads=1),
        }
        times = latencies(sessions, held_out[:1], rounds=30, max_seconds=5)
        rows.append({name: p10(values) for name, values in times.items()})
    reference = embed(sessions[FP32], held_out)
    variants = {
        name: {
            "ms": float(np.median([row[name] for row in rows])),
            "of_shipped": float(np.median([row[name] / row[SHIPPED] for row in rows])),
            "centred_cosine": agreement(reference, embed(session, held_out)).centred_cosine,
        }
        for name, session in sessions.items()
    }
    return {"student": student, "precision": bundle.manifest.image.precision, "variants": variants,
            "remarks": notes.remarks}  # fmt: skip


def table_of(results: list[dict[str, Any]]) -> str:
    names = [name for name in results[0]["variants"] if name != SHIPPED]
    lines = [["student", "shipped", *names, "fastest that agrees"]]
    for row in results:
        variants, limit = row["variants"], Budget().min_agreement("image")
        fit = {name: v["of_shipped"] for name, v in variants.items() if v["centred_cosine"] >= limit}
        best = min(fit, key=lambda name: fit[name])
        cells = [f"{v['of_shipped']:.2f}, {v['centred_cosine']:.4f}" for name, v in variants.items() if name != SHIPPED]
        own = variants[SHIPPED]
        verdict = "what is shipped" if fit[best] > FASTER else f"{best}, {fit[best]:.2f}"
        lines.append(
            [row["student"], f"{row['precision']}, {own['ms']:.2f} ms, {own['centred_cosine']:.4f}", *cells, verdict]
        )
    said = [f"- `{row['student']}`: {'; '.join(row['remarks']) or 'nothing'}" for row in results]
    table = markdown_table(lines, left=(0, 1, len(lines[0]) - 1))
    return "\n".join([table, "", "What the export adds, of faster or more accurate files:", "", *said])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    add_output_options(parser, "shipped")
    arguments = parser.parse_args()
    results = []
    for student in arguments.students:
        path = arguments.work / f"{student.replace('/', '-')}.json"
        if not path.is_file():
            result = measure(student, arguments.work)
            path.write_text(json.dumps(result), encoding="utf-8")
        results.append(json.loads(path.read_text(encoding="utf-8")))
    publish({**here_and_now(), "results": results}, table_of(results), arguments)


if __name__ == "__main__":
    main()
