"""Whether a small ViT gains by the weights of a larger one, chosen by learned masks as in TinyCLIP (Wu et al. 2023).

    python -m benchmarks.training.inherited held-out WORK --seeds 0 1 2 -o inherited.json

A ViT of width 192 is distilled first; it stands for a published model. Students of width 128 have two of its three
heads in each layer and two thirds of its dimensions and neurons: from random weights, from those that come first, or
from those that masks choose. The masks are learned together with the weights so that the embeddings of training images
stay; they are hard, with straight-through gradients, where TinyCLIP has hard concrete ones. All students share text
tower, data, order of batches and, within a seed, everything else. Scores are those of held-out pairs (`held_out.py`);
no test split is looked at.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import clip_rd_edge as edge
from benchmarks.publishing import add_output_options, here_and_now, publish
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.preprocess import preprocess
from clip_rd_edge.models.load import load_clip

LAYERS, WIDTH, KEPT, HEAD = 12, 192, 128, 64
STEPS, LARGE_STEPS, MASK_STEPS, BATCH = 330, 1500, 300, 64
WAYS = ("nothing", "the first", "masks")
Masks = dict[str, Tensor]  # `width` (W), and of each layer, by its prefix, its heads and its neurons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="of held_out.py")
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_output_options(parser, "inherited")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, work = arguments.data, arguments.work
    large = distilled(data, work / "large", vit(work, WIDTH), steps=LARGE_STEPS, seed=0)
    seconds = learn_masks(data, large, work)
    rows = [{"way": "the larger ViT", "seed": 0, "top1": scores(data, large)}]
    for seed in arguments.seeds:
        first = distilled(data, work / f"start-{seed}", vit(work, KEPT), steps=1, seed=seed)
        for way in WAYS:
            start = with_tower(first, work / f"start-{seed}-{way.replace(' ', '-')}", work, way)
            student = distilled(
                data, start.with_name(start.name.replace("start", "run")), start, steps=STEPS, seed=seed
            )
            rows.append({"way": way, "seed": seed, "top1": scores(data, student)})
    publish({**here_and_now(), "masks_seconds": seconds, "rows": rows}, table_of(rows), arguments)


def vit(work: Path, width: int) -> Path:
    """Write the configuration of an image tower of open_clip's own ViT, and return its path."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"vit-{width}.json"
    vision = {"layers": LAYERS, "width": width, "head_width": HEAD, "patch_size": 16}
    path.write_text(json.dumps({"vision_cfg": vision, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    return path


def distilled(data: Path, run: Path, student: Path, *, steps: int, seed: int) -> Path:
    """Return a student that has learnt from the teacher with the default recipe; runs that are there are kept."""
    if not (run / "student").is_dir():
        new = {"text": str(data / "trimmed"), "context_length": 16, "embedding_size": 384, "image_size": 64}
        edge.distill(
            data=str(data / "pairs.csv"), teacher=str(data / "teacher"), store=str(data / f"store-{seed}"), views=5,
            student=str(student), recipe="clip-kd-bank", freeze_text_layers=2, batch_size=32, learning_rate=1e-3,
            precision="fp32", steps=steps, seed=seed, workers=0, output=run, resume=run.is_dir(),
            **(new if student.suffix else {}),
        )  # fmt: skip
    return run / "student"


def scores(data: Path, student: Path) -> list[float]:
    return [float(score.top1) for score in edge.evaluate(student, [data / "style", data / "concepts"])]


def learn_masks(data: Path, large: Path, work: Path) -> float:
    """Write the sliced towers of the larger ViT, by its first parts and by learned masks; return the seconds."""
    began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    clip = load_clip(str(large))
    tower = clip.model.get_submodule("visual")
    with (data / "pairs.csv").open(encoding="utf-8", newline="") as file:
        paths = [Path(row["filepath"]) for row in csv.DictReader(file)]
    pixels = torch.from_numpy(np.stack([preprocess(open_image(path), clip.preprocessing) for path in paths]))
    with torch.no_grad():
        wanted = torch.cat([torch.nn.functional.normalize(tower(part)) for part in pixels.split(256)])
    given = {name: value.detach().clone() for name, value in tower.state_dict().items()}
    weights = {name: value.clone().requires_grad_() for name, value in given.items()}
    importance = {name: value.requires_grad_() for name, value in starting_importance(given).items()}
    optimizer = torch.optim.AdamW([
        {"params": list(weights.values()), "lr": 2e-4},
        {"params": list(importance.values()), "lr": 2e-2, "weight_decay": 0.0},
    ])  # fmt: skip
    torch.manual_seed(0)
    for step in range(MASK_STEPS):
        rows = torch.randint(len(pixels), (BATCH,))
        embeddings = torch.func.functional_call(tower, masked(weights, hard(importance)), (pixels[rows],))
        loss = 1 - (torch.nn.functional.normalize(embeddings) * wanted[rows]).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == MASK_STEPS - 1:
            print(f"masks, step {step}: cosine {1 - loss.item():.3f}", flush=True)
    first = {name: -torch.arange(value.numel(), dtype=torch.float32) for name, value in importance.items()}
    chosen = {"the first": sliced(given, first), "masks": sliced(weights, importance)}
    for way, state in chosen.items():
        save_file({f"visual.{name}": value for name, value in state.items()}, work / f"{way}.safetensors")
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime - began


def starting_importance(weights: Mapping[str, Tensor]) -> Masks:
    """Return the norm of what each dimension, head and neuron writes, relative to the mean of its kind."""
    found = {"width": weights["positional_embedding"].norm(dim=0)}
    for layer in layers():
        columns = weights[f"{layer}attn.out_proj.weight"].norm(dim=0)
        found[f"{layer}attn"] = columns.view(-1, HEAD).norm(dim=1)
        found[f"{layer}mlp"] = weights[f"{layer}mlp.c_proj.weight"].norm(dim=0)
    return {name: value / value.mean() for name, value in found.items()}


def layers() -> list[str]:
    return [f"transformer.resblocks.{number}." for number in range(LAYERS)]


def layer_of(name: str) -> str:
    """Return the prefix of the layer that a weight belongs to, empty for others."""
    return next((layer for layer in layers() if name.startswith(layer)), "")


def kept(importance: Tensor) -> Tensor:
    """Return the indices of the two thirds that are most important, ascending."""
    return importance.topk(importance.numel() * KEPT // WIDTH).indices.sort().values


def hard(importance: Masks) -> Masks:
    """Return masks of ones and zeros, whose gradients are those of the importance."""
    masks = {}
    for name, value in importance.items():
        mask = torch.zeros_like(value).index_fill(0, kept(value.detach()), 1.0)
        masks[name] = mask + value - value.detach()
    return masks


def masked(weights: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """Return weights with which a tower computes what its masks leave; what is masked writes and reads zeros."""
    width, out = masks["width"], dict(weights)
    for name, value in weights.items():
        layer = layer_of(name)
        if name == "conv1.weight":
            out[name] = value * width[:, None, None, None]
        elif name in ("class_embedding", "positional_embedding") or ".ln_" in f".{name}":
            out[name] = value * width
        elif name.endswith("attn.out_proj.weight"):
            out[name] = value * width[:, None] * masks[f"{layer}attn"].repeat_interleave(HEAD)
        elif name.endswith("mlp.c_proj.weight"):
            out[name] = value * width[:, None] * masks[f"{layer}mlp"]
        elif name.endswith(("out_proj.bias", "c_proj.bias")):
            out[name] = value * width
    return out


def sliced(weights: Mapping[str, Tensor], importance: Masks) -> dict[str, Tensor]:
    """Return the smaller tower's weights. A norm's variance had zeros for what was masked: its gain makes up."""
    width, out = kept(importance["width"].detach()), dict[str, Tensor]()
    for name, given in weights.items():
        value = given.detach()
        layer = layer_of(name)
        if layer:
            head = kept(importance[f"{layer}attn"].detach())
            rows = (head[:, None] * HEAD + torch.arange(HEAD)).flatten()
            neurons = kept(importance[f"{layer}mlp"].detach())
        if ".ln_" in f".{name}":
            value = value[width] * (KEPT / WIDTH) ** -0.5 if name.endswith("weight") else value[width]
        elif name in ("conv1.weight", "class_embedding", "proj") or name.endswith(("out_proj.bias", "c_proj.bias")):
            value = value[width]
        elif name == "positional_embedding":
            value = value[:, width]
        elif "in_proj" in name:
            value = value.view(3, WIDTH, -1)[:, rows].flatten(0, 1)
            value = value[:, width] if name.endswith("weight") else value.flatten()
        elif name.endswith("out_proj.weight"):
            value = value[width][:, rows]
        elif name.endswith("c_fc.weight"):
            value = value[neurons][:, width]
        elif name.endswith("c_fc.bias"):
            value = value[neurons]
        elif name.endswith("c_proj.weight"):
            value = value[width][:, neurons]
        out[name] = value.contiguous()
    return out


def with_tower(student: Path, copy: Path, work: Path, way: str) -> Path:
    """Return a copy of a student with the image tower of a way, of the same shapes."""
    if not copy.is_dir():
        shutil.copytree(student, copy)
        if way != "nothing":
            path = copy / "open_clip_model.safetensors"
            weights, tower = load_file(path), load_file(work / f"{way}.safetensors")
            own = {name: value.shape for name, value in weights.items() if name.startswith("visual.")}
            assert own == {name: value.shape for name, value in tower.items()}
            save_file({**weights, **tower}, path)
    return copy


def table_of(rows: list[dict[str, Any]]) -> str:
    lines = [["image tower from", "held-out pairs, style and concepts, top-1", "seeds"]]
    for way in dict.fromkeys(row["way"] for row in rows):
        values = np.array([100 * np.mean(row["top1"]) for row in rows if row["way"] == way])
        spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
        lines.append([way, f"{values.mean():.1f}{spread}", str(len(values))])
    return markdown_table(lines)


if __name__ == "__main__":
    main()
