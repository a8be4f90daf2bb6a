"""Measure time and memory of the objective against a plain implementation that needs thirteen matrix products.

    python -m benchmarks.training.objective                            # N = 4,096, D = 512, blocks of 512
    python -m benchmarks.training.objective --pairs 2048 --block 256   # forward and backward, in float32

Every measurement runs in its own process, so that its peak memory can be measured. Versions take turns; times are
medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_rd_edge.distillation.config import load_recipe
from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.losses.terms import EmbeddingBatch

WIDTH, TURNS = 512, 3
VERSIONS = ("plain", "ours", "blocks")


def plain(batch: EmbeddingBatch, gamma_s: Tensor, gamma_t: float, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Compute CLIP-RD as written in the paper, term by term, each with its own products."""
    s_v, s_t, t_v, t_t = batch.student_image, batch.student_text, batch.teacher_image, batch.teacher_text
    targets = torch.arange(len(s_v))

    def divergence(target: Tensor, logits: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(logits, 1), F.softmax(target.detach(), 1), reduction="batchmean")

    student, student_t = gamma_s * s_v @ s_t.T, gamma_s * s_t @ s_v.T
    task = (F.cross_entropy(student, targets) + F.cross_entropy(student_t, targets)) / 2
    fd = F.mse_loss(s_v, t_v) + F.mse_loss(s_t, t_t)
    icl = (F.cross_entropy(c * s_v @ t_t.T, targets) + F.cross_entropy(c * s_t @ t_v.T, targets)) / 2
    hrd = (divergence(gamma_t * t_v @ t_t.T, student) + divergence(gamma_t * t_t @ t_v.T, student_t)) / 2
    image, image_t = a * t_v @ s_v.T, a * s_v @ t_v.T
    text, text_t = b * t_t @ s_t.T, b * s_t @ t_t.T
    vrd = (divergence(text, image) + divergence(text_t, image_t)) / 2
    vrd_ce = (F.cross_entropy(image, targets) + F.cross_entropy(image_t, targets)) / 2
    vrd_ce = vrd_ce + (F.cross_entropy(text, targets) + F.cross_entropy(text_t, targets)) / 2
    cross, other = c * t_v @ s_t.T, c * t_t @ s_v.T
    cross_t = c * s_t @ t_v.T
    xrd = divergence(other, cross) + divergence(cross, other)
    xrd = xrd + divergence(other.T, cross_t) + divergence(cross_t, other.T)
    return task + 2000 * fd + icl + hrd + vrd + vrd_ce + xrd / 4


def run(version: str, pairs: int, block_size: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(pairs, WIDTH, generator=generator), dim=-1) for _ in range(4)]
    batch = EmbeddingBatch(rows[0].requires_grad_(), rows[1].requires_grad_(), rows[2], rows[3])
    objective = Objective(load_recipe("clip-rd").objective)
    gamma = torch.tensor(14.3, requires_grad=True)
    scales = objective.scales

    def step() -> float:
        if version == "plain":
            loss = plain(
                batch, gamma, 100.0, *(scales.multiplier(p) for p in (scales.image, scales.text, scales.cross))
            )
            loss.backward()
            return loss.item()
        size = block_size if version == "blocks" else pairs
        total = 0.0
        for start in range(0, pairs, size):
            block = None if size == pairs else slice(start, start + size)
            loss = objective(batch, gamma, 100.0, block=block).total
            loss.backward()
            total += loss.item()
        return total

    torch.ones(64, 64) @ torch.ones(64, 64)  # the library's own memory is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value = step()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    start = time.perf_counter()
    step()
    return {"seconds": time.perf_counter() - start, "peak_bytes": float(peak), "loss": value}


def main(pairs: int, block: int) -> None:
    sizes = [f"--pairs={pairs}", f"--block={block}"]
    results: dict[str, list[dict[str, float]]] = {version: [] for version in VERSIONS}
    for _ in range(TURNS):
        for version in VERSIONS:
            process = subprocess.run(
                [sys.executable, "-m", "benchmarks.training.objective", version, *sizes],
                capture_output=True,
                text=True,
                check=True,
            )
            results[version].append(json.loads(process.stdout))
    medians = {
        version: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for version, runs in results.items()
    }
    base = medians["plain"]
    for version, values in medians.items():
        print(
            f"{version:>6}: {values['seconds']:6.2f} s ({values['seconds'] / base['seconds']:.2f}×), "
            f"peak {values['peak_bytes'] / 2**20:6.0f} MiB ({values['peak_bytes'] / base['peak_bytes']:.2f}×), "
            f"loss {values['loss']:.4f}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="?", choices=VERSIONS, help="measure this one, and print JSON")
    parser.add_argument("--pairs", type=int, default=4096)
    parser.add_argument("--block", type=int, default=512)
    arguments = parser.parse_args()
    if arguments.version:
        print(json.dumps(run(arguments.version, arguments.pairs, arguments.block)))
    else:
        main(arguments.pairs, arguments.block)
