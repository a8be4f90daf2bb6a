"""Record what the package computes, to show that a change of its code changed none of it.

    python -m benchmarks.robustness.record -o before.json    # some minutes on one thread
    python -m benchmarks.robustness.record -o after.json --only runs bundles
    python -m benchmarks.robustness.record --compare before.json after.json

A record has a line for each thing, most of them a SHA-256: the weights of short runs, a thousand views of each kind of
data, every file of each format that can be exported here, embeddings, predictions and accuracies. Its data are the
built-in emoji, and images, tables and shards that it makes itself. Two records of one commit and one machine are
equal; processors differ in how they round. Exit code 1 if a line differs, or is in one record alone.

It calls what users call, so that it outlasts moved modules; the exceptions are `fix_times` and `bytes_of`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import numpy as np
from PIL import Image

import clip_rd_edge as edge

Line = tuple[str, object]
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 220), "yellow": (230, 220, 40)}
TABLE, PARQUET, IMAGES, TEXTS = "pairs.csv", "pairs.parquet", "photos", "labels.txt"
# A run is named by its folder's name in `runs`; `RUN:name` stands for the student of another.
RUN = "RUN:"
TINY: dict[str, Any] = {
    "student": "test_resnet", "image_size": 48, "text": "64x1", "context_length": 12, "batch_size": 8, "steps": 20,
    "precision": "fp32", "workers": 0,
}  # fmt: skip
TEACHER = f"{RUN}teacher"
PAIRS: dict[str, Any] = {"data": TABLE, "teacher": TEACHER}
# Of a student that begins as another, which has its own shape.
TRAINED = {**PAIRS, "student": f"{RUN}clip-rd", "image_size": None, "text": None, "context_length": None}
PROMPTS = ["a {} picture", "a photo of {}"]
_TEACHERS: dict[str, dict[str, Any]] = {
    "teacher": {"recipe": "clip", "data": TABLE, "embedding_size": 24, "steps": 2, "seed": 1},
    "other-teacher": {"recipe": "clip", "data": TABLE, "embedding_size": 16, "image_size": 40, "steps": 2, "seed": 2},
}
_SHARDS = {"data": "a-{0..1}.tar::b.tar", "train_data_upsampling_factors": "1::2"}
RUNS: dict[str, dict[str, Any]] = {
    "clip": {"recipe": "clip", "data": TABLE, "student": "test_vit", "image_size": 64},
    "clip-kd": {
        **_SHARDS, "recipe": "clip-kd", "teacher": TEACHER, "ema_decay": 0.9, "tasks": TABLE, "evaluate_every": 10,
    },
    "tinyclip": {"recipe": "tinyclip", "data": PARQUET, "teacher": TEACHER, "embedding_size": 32},
    "clip-rd": {"data": "emoji", "teacher": TEACHER},
    "clip-rd-paper": {**PAIRS, "recipe": "clip-rd-paper", "pretrained_text": "teacher"},
    "blocks": {
        **PAIRS, "student": "test_efficientnet", "accumulate": 2, "loss_block": 3, "gradient_checkpointing": True,
    },
    "bank": {**PAIRS, "recipe": "clip-rd-bank", "pretrained_text": "tokens"},
    "bank-of-store": {**PAIRS, "recipe": "clip-rd-bank", "views": 2, "store": "store"},
    "frozen": {**TRAINED, "freeze_text_layers": 1, "freeze_image": 1, "freeze_norms": True, "tuned_share": 0.5},
    "unpaired": {"images": IMAGES, "texts": TEXTS, "templates": PROMPTS, "teacher": TEACHER, "text": "teacher"},
    "two-teachers": {**PAIRS, "teacher": [TEACHER, f"{RUN}other-teacher"]},
    "int8": {**TRAINED, "quantize": "int8"},
    "two-processes": PAIRS,
    "killed": {**PAIRS, "checkpoint_every": 5},
}  # fmt: skip
SOURCES: dict[str, dict[str, Any]] = {
    "table": {"data": TABLE},
    "shards": _SHARDS,
    "mixed": {"data": TABLE, "images": IMAGES, "texts": TEXTS, "templates": PROMPTS},
}
VIEWS, VIEWS_PER_LINE, BATCH_SIZE = 1_000, 100, 20
# What is exported, `clip-rd` where nothing else is named, and how.
_INT8 = {"precision": "int8", "calibration": TABLE, "fallback": "fp32"}
_LABELS = list(COLOURS)
BUNDLES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "int8": {**_INT8, "min_agreement": 0.9, "fallback": "fp16"},
    "int8-trained": {**_INT8, "model": "int8"},
    "vit-int8": {**_INT8, "model": "clip"},
    "labels": {"labels": _LABELS, "text_tower": False},
    "in-graph": {"preprocess_in_graph": True},
    "targets": {"target": ["cpu-x86-vnni", "cpu-arm"], "calibration": TABLE, "fallback": "fp32"},
    "gpu-int8": {"target": "nvidia-gpu", "precision": "int8", "calibration": TABLE},
    "gpu-fp16": {"target": "nvidia-gpu"},
    "openvino-fp32": {"format": "openvino"},
    "openvino-bf16": {"format": "openvino", "precision": "bf16"},
    "openvino-int8": {**_INT8, "format": "openvino"},
    "litert-fp32": {"format": "litert"},
    "litert-int8": {**_INT8, "format": "litert"},
    "executorch-fp32": {"format": "executorch"},
    "coreml-fp16": {"format": "coreml", "precision": "fp16"},
    "huggingface": {**_INT8, "layout": "huggingface"},
    "immich": {"model": "clip", "layout": "immich"},
    "browser": {"target": "browser", "labels": _LABELS, "node_modules": "node_modules"},
}
ANSWERING = ("fp32", "fp16", "int8", "int8-trained", "vit-int8", "labels", "in-graph", "openvino-bf16", "openvino-int8")
# What the browser's page takes from npm, here a line of text each.
_ORT, _WASM = "onnxruntime-web/dist", "ort-wasm-simd-threaded"
NPM = [
    *(f"{_ORT}/{name}" for name in ("ort.wasm.min.mjs", "ort.webgpu.min.mjs")),
    *(f"{_ORT}/{_WASM}{suffix}" for suffix in (".mjs", ".wasm", ".asyncify.mjs", ".asyncify.wasm")),
    *(f"@huggingface/tokenizers/{name}" for name in ("dist/tokenizers.min.mjs", "LICENSE")),
]


def fix_times() -> None:
    """Let no choice depend on the clock. To be adapted where `time_in_turn` moves.

    Of what is timed in turn, the first (float32, or the model as it is) takes 2 ms and all others 1 ms. To be called
    before another module imports the function.
    """
    from clip_rd_edge.utils import timing

    def in_turn(calls: Mapping[str, Callable[[], object]], **_: object) -> dict[str, np.ndarray]:
        for call in calls.values():
            call()
        return {name: np.full(10, 1.0 if number else 2.0) for number, name in enumerate(calls)}

    timing.time_in_turn = in_turn
    time.process_time = lambda: 0.0  # by which the search for INT8 limits its work


def bytes_of(batch: Any) -> bytes:
    """Return what a batch of training holds. To be adapted where its attributes are renamed."""
    pixels = [batch.student_pixels, *batch.teacher_pixels]
    texts = repr((batch.captions, batch.paired)).encode()
    return b"".join([*(each.contiguous().numpy().tobytes() for each in pixels), texts])


def runs() -> Iterator[Line]:
    """Yield the weights of each run, and what it reports of itself."""
    for name in RUNS:
        folder = trained(name)
        yield f"runs/{name}/weights", weights(f"{folder}/student")
        yield f"runs/{name}/open_clip_config.json", digest(Path(folder, "student/open_clip_config.json").read_bytes())
        yield f"runs/{name}/losses", digest(*map(repr, losses(folder)))
    yield "runs/clip-kd/best", weights(f"{trained('clip-kd')}/best")
    for path in files("store"):
        yield f"runs/bank-of-store/{path}", content(path)


def batches() -> Iterator[Line]:
    """Yield the first thousand views of each source, a hundred per line."""
    from torch.utils.data import DataLoader

    plain, parts = DataLoader.__iter__, list[bytes]()

    def watched(loader: Any) -> Iterator[Any]:
        for batch in plain(loader):
            parts.append(bytes_of(batch))
            yield batch

    DataLoader.__iter__ = watched
    try:
        for name, source in SOURCES.items():
            size = {"batch_size": BATCH_SIZE, "steps": VIEWS // BATCH_SIZE}
            edge.distill(output=f"batches/{name}", **resolved({**TINY, "teacher": TEACHER, **size, **source}))
            training = parts[-size["steps"] :]  # before it, a run looks at a batch to choose its precision
            for start in range(0, VIEWS, VIEWS_PER_LINE):
                of_line = training[start // BATCH_SIZE : (start + VIEWS_PER_LINE) // BATCH_SIZE]
                yield f"batches/{name}/{start}", digest(*of_line)
    finally:
        DataLoader.__iter__ = plain


def bundles() -> Iterator[Line]:
    """Yield every file of each export."""
    for name in BUNDLES:
        folder = exported(name)
        if isinstance(folder, edge.ClipRdEdgeError):
            yield f"bundles/{name}", type(folder).__name__  # MissingExtraError: a package is not installed
            continue
        for path in files(folder):
            yield f"bundles/{name}/{path.relative_to(folder).as_posix()}", content(path)


def answers() -> Iterator[Line]:
    """Yield embeddings, predictions, accuracies, and the weights of models that are made from others."""
    tasks = [TABLE, "emoji:unseen-style", "emoji:unseen-concepts:retrieval"]
    images = sorted(Path(IMAGES).iterdir())[:10]
    texts = ["a photo of a cat", "", "two dogs, running through tall grass", "Überraschung! 猫と犬"]
    models = {"student": trained("clip-rd"), "int8-student": trained("int8")}
    models |= {name: folder for name in ANSWERING if isinstance(folder := exported(name), str)}
    for name, path in models.items():
        model = edge.load(path, threads=1)
        yield f"answers/{name}/images", digest(model.encode_images(images).tobytes())
        if model.has_text_tower:
            yield f"answers/{name}/texts", digest(model.encode_texts(texts).tobytes())
        predictions = model.classify(images, labels=_LABELS, cache=False)
        yield f"answers/{name}/predictions", digest(repr([[tuple(each) for each in image] for image in predictions]))
        if name in ("student", "fp32", "int8"):
            for score in edge.evaluate(model, tasks):
                yield f"answers/{name}/{score.task}", str(score)
    edge.index(exported("fp32"), IMAGES, "index", threads=1)
    for query in ("red", str(images[0])):
        hits = edge.search("index", query, threads=1)
        yield f"answers/search/{query}", str([(Path(hit.path).name, hit.similarity) for hit in hits])
    edge.average(trained("clip-rd"), trained("frozen"), "average", weight=0.25)
    yield "answers/average", weights("average")
    edge.trim(trained("clip-rd-paper"), "trimmed", vocabulary=1_000, texts=TEXTS)
    yield "answers/trim", weights("trimmed")


PARTS: dict[str, Callable[[], Iterator[Line]]] = {
    "runs": runs, "batches": batches, "bundles": bundles, "answers": answers
}  # fmt: skip


@cache
def trained(name: str) -> str:
    """Train a run, unless it has been, and return its folder."""
    folder = f"runs/{name}"
    settings = resolved({**TINY, **(RUNS | _TEACHERS)[name]})
    if name == "two-processes":
        flags = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        subprocess.run([sys.executable, *launcher, "-m", "clip_rd_edge", "distill", *flags, "-o", folder], check=True)
        return folder
    if name == "killed":
        killed = subprocess.run(
            [sys.executable, "-c", _KILLED, json.dumps({**settings, "output": folder})], check=False
        )
        assert killed.returncode == -9, killed.returncode
        settings["resume"] = True
    edge.distill(output=folder, **settings)
    return folder


_KILLED = """
import json, os, sys, clip_rd_edge as edge
class Kill(edge.Reporter):
    def update(self, stage, step=0, total=None, message=""):
        if (stage, step) == ("training", 13):
            os.kill(os.getpid(), 9)
edge.distill(**json.loads(sys.argv[1]), reporter=Kill())
"""


def resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which the runs that they name are trained, without those that are None."""

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(each) for each in value]
        return trained(value.removeprefix(RUN)) if isinstance(value, str) and value.startswith(RUN) else value

    return {key: named(value) for key, value in settings.items() if value is not None}


@cache
def exported(name: str) -> str | edge.ClipRdEdgeError:
    """Export a bundle, unless it has been, and return its folder, or why it cannot be exported here."""
    folder, options = f"bundles/{name}", {"model": "clip-rd", **BUNDLES[name]}
    try:
        edge.export(trained(options.pop("model")), folder, **options)
    except edge.ClipRdEdgeError as error:
        return error
    return folder


def weights(folder: str) -> str:
    """Return the SHA-256 of a model's tensors, by name."""
    from safetensors.numpy import load_file

    tensors = sorted(load_file(Path(folder, "open_clip_model.safetensors")).items())
    return digest(*(part for name, tensor in tensors for part in (name, repr(tensor.shape), tensor.tobytes())))


def losses(run: str) -> list[dict[str, float]]:
    """Return the figures of a run's metrics that no clock decides."""
    lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    kept = re.compile("step|loss|.*positive|.*negative|evaluation|gradient_norm|logit_scale|learning_rate")
    return [{key: value for key, value in line.items() if kept.match(key)} for line in lines]


def content(path: Path) -> object:
    """Return a file's SHA-256; of a manifest, the content without dates, versions, and what was measured."""
    return lasting(json.loads(path.read_bytes())) if path.name == "manifest.json" else digest(path.read_bytes())


def lasting(value: Any) -> Any:
    passing = {"measured", "checksum", "files", "date", "machine", "versions"}
    if isinstance(value, dict):
        versions = {key for key, each in value.items() if isinstance(each, str) and _VERSION.fullmatch(each)}
        return {key: lasting(each) for key, each in value.items() if key not in passing | versions}
    return [lasting(each) for each in value] if isinstance(value, list) else value


_VERSION = re.compile(r"\d+(\.\d+)+[\w.+]*")


def files(folder: str) -> Iterable[Path]:
    """Return the files of a folder, sorted, without locks."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith("."))


def digest(*parts: bytes | str) -> str:
    """Return the SHA-256 of parts, each with its length."""
    hash_ = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        hash_.update(len(data).to_bytes(8, "big") + data)
    return hash_.hexdigest()


def make_data() -> None:
    """Write images, a table of them, shards, texts, and stand-ins for npm's packages into the current folder."""
    import pyarrow
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    Path(IMAGES).mkdir()
    rows = list[tuple[str, str]]()
    for number in range(96):
        colour = list(COLOURS)[number % 4]
        height, width = rng.integers(40, 90, 2)
        noise = rng.integers(-40, 40, (height, width, 3)) + np.linspace(-30, 30, width)[None, :, None]
        pixels = (np.asarray(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)
        name = f"{IMAGES}/{number:02}.{'jpg' if number % 3 else 'png'}"
        Image.fromarray(pixels).save(name)
        rows.append((name, f"a {colour} picture, number {number}"))
    with Path(TABLE).open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    columns = dict(zip(("filepath", "title"), map(list, zip(*rows, strict=True)), strict=True))
    parquet.write_table(pyarrow.table(columns), PARQUET)
    for shard, part in {"a-0.tar": rows[:32], "a-1.tar": rows[32:64], "b.tar": rows[64:]}.items():
        with tarfile.open(shard, "w") as tar:
            for name, caption in part:
                stem, suffix = Path(name).stem, Path(name).suffix
                for member, data in ((f"{stem}{suffix}", Path(name).read_bytes()), (f"{stem}.txt", caption.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    Path(TEXTS).write_text("\n".join([*COLOURS, "a cat", "two dogs", "a house", "a tree", "small", "large", ""]))
    for name in NPM:
        Path("node_modules", name).parent.mkdir(parents=True, exist_ok=True)
        Path("node_modules", name).write_text(name)


def record(parts: Iterable[str], output: Path) -> None:
    """Write a record of some parts, made in a scratch folder."""
    started = time.perf_counter()
    made: dict[str, Any] = {"machine": here(), "parts": [], "lines": {}}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        os.chdir(scratch)
        make_data()
        for part in parts:
            made["lines"].update(PARTS[part]())
            made["parts"].append(part)
            output.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
            print(f"{part}: done after {time.perf_counter() - started:.0f} s", file=sys.stderr)
        os.chdir(output.parent)


def here() -> str:
    """Return the processor and the packages whose arithmetic a record depends on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    processor = {line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")}
    packages = ("torch", "onnxruntime", "numpy", "pillow", "timm", "open_clip_torch")
    return ", ".join([*processor, *(f"{name} {version(name)}" for name in packages)])


def compare(before: Path, after: Path) -> int:
    """Print what is equal and what differs, and return the number of lines that differ."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    if old["machine"] != new["machine"]:
        print(f"The machines differ, and so may their rounding: {old['machine']}; {new['machine']}.")
    parts = set(old["parts"]) & set(new["parts"])
    names = dict.fromkeys(name for name in (*old["lines"], *new["lines"]) if name.split("/")[0] in parts)
    differing = 0
    for name in names:
        changes = differences(*(lines["lines"].get(name) for lines in (old, new)))
        differing += bool(changes)
        print(f"DIFFERS  {name}: {'; '.join(changes)}" if changes else f"equal    {name}")
    print(f"{len(names) - differing} equal, {differing} differ, in {', '.join(sorted(parts))}")
    return differing


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Return the differences of two values as `key: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [each for key in keys for each in differences(old.get(key), new.get(key), f"{place}{key}: ")]
    return [] if old == new else [f"{place}{old} -> {new}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Record what the package computes, or compare two records.")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to record")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="records to compare")
    arguments = parser.parse_args()
    if arguments.compare:
        sys.exit(min(1, compare(*arguments.compare)))
    if not arguments.output:
        parser.error("name the file to write, with -o, or two records, with --compare")
    fix_times()
    record(arguments.only, arguments.output.absolute())


if __name__ == "__main__":
    main()
