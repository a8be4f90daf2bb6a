"""Take open_clip's architectures through the toolkit, with random weights under the names of published ones.

    python -m benchmarks.devices.published WORK -o benchmarks/results/MACHINE/published.json \\
        --readme benchmarks/measurements/published.md

Each is fetched by NAME@TAG from a hub on the loopback (NAME@FILE where open_clip has no tag), exported in float32,
which is compared with torch, exported in INT8 within a limited time, trained as a student, and distilled from as a
teacher. The statistics of its batch norms are those of some images, so that activations have sizes as in use; agreement
says nothing with random weights, and is left out. WORK keeps what is done: an interrupted run is resumed, and --minutes
ends one between two steps. Architectures that were not reached are left out; a step that was not is `not run`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.server
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.publishing import add_output_options, publish

# By the size of both towers; MobileCLIP-S0 is not among open_clip's architectures.
NAMES = (
    "ViT-S-32", "MobileCLIP2-S0", "PE-Core-T-16-384", "RN50", "ViT-S-16", "ViTamin-S", "MobileCLIP-S1", "ViT-M-32",
    "ViT-M-16", "convnext_tiny", "vit_medium_patch16_gap_256", "MobileCLIP2-S2", "PE-Core-S-16-384", "RN101",
    "MobileCLIP2-S3", "ViT-B-32", "ViT-B-16", "ViT-B-32-quickgelu", "EVA02-B-16", "swin_base_patch4_window7_224",
    "convnext_base", "MobileCLIP2-B", "convnext_base_w", "RN50x4", "ViTamin-B", "MobileCLIP2-S4", "ViT-B-16-SigLIP",
    "roberta-ViT-B-32", "coca_ViT-B-32", "xlm-roberta-base-ViT-B-32", "ViT-B-16-SigLIP2", "ViT-B-32-SigLIP2-256",
    "ViT-L-14", "PE-Core-B-16",
)  # fmt: skip
STEPS = ("FP32", "INT8", "student", "teacher")
LARGE = 160e6  # parameters, from which on there are 2 steps of training and not 20
IMAGES = 32
SEARCH_MINUTES = float(os.environ.get("SEARCH_MINUTES", "1.5"))  # of the environment, as each step is a process
MIN_AGREEMENT = 0.8  # of random weights, so that speed and size decide; trained ones have .99
NOT_RUN = "not run"


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """A tower in float32 and as it is shipped: median latencies, timed in turn, and sizes of the files."""

    fp32_ms: float
    ms: float
    fp32_bytes: int
    bytes: int
    precision: str


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one of STEPS: a sentence if it failed, else figures; with its seconds and peak memory."""

    failed: str = ""
    seconds: float = 0.0
    processor_seconds: float = 0.0
    peak_bytes: int = 0
    difference: float | None = None
    towers: dict[str, Latency] = {}
    steps: int = 0


class Row(msgspec.Struct, kw_only=True):
    """An architecture; a step that was not reached is not in `steps`."""

    name: str
    loaded_as: str = ""
    parameters: int = 0
    steps: dict[str, Step] = {}


def reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def random_model(name: str, folder: Path) -> int:
    """Write an architecture's random weights, and the files of its tokenizer; return the number of parameters."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = open_clip.get_model_config(name)
    tokenizer_files(config["text_cfg"], folder)
    model = open_clip.create_model(name, pretrained_hf=False)
    settle(model)
    state = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, str(folder / "open_clip_model.safetensors"), metadata={"format": "pt"})
    file = next(iter(sources(name).values()), "").rpartition("/")[2]
    if file.endswith(".bin"):  # ORG/REPO/FILE; else ORG/REPO/
        torch.save(state, folder / file)
    return sum(value.numel() for value in model.parameters())


def settle(model: Any) -> None:
    """Give the image tower's norms the statistics of IMAGES emoji, as random weights have no others."""
    import torch

    from clip_rd_edge.bundle.preprocess import preprocess
    from clip_rd_edge.data.emoji import training_pairs
    from clip_rd_edge.models.load import preprocessing_of

    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    if norms:
        pairs, preprocessing = training_pairs(), preprocessing_of(model)
        pixels = [preprocess(pairs.read(index).image(), preprocessing) for index in range(IMAGES)]
        for layer in norms:
            layer.momentum = None  # the mean over the batches
        with torch.no_grad():
            for start in range(0, IMAGES, 8):
                model.train().encode_image(torch.stack([torch.from_numpy(each) for each in pixels[start : start + 8]]))


def tokenizer_files(text_cfg: dict[str, Any], folder: Path) -> None:
    """Write a tokenizer of words as a repository has it, and the configuration of a text tower of transformers."""
    from transformers import AutoConfig

    from clip_rd_edge.data.emoji import training_pairs

    pairs = training_pairs()
    write_tokenizer(folder, {word for index in range(320) for word in pairs.read(index).captions[0].lower().split()})
    if "hf_model_name" in text_cfg:
        large = {"vocab_size": 250002} if text_cfg["hf_model_name"].startswith("xlm") else {"vocab_size": 50265}
        kind = "xlm-roberta" if text_cfg["hf_model_name"].startswith("xlm") else "roberta"
        AutoConfig.for_model(kind, max_position_embeddings=514, type_vocab_size=1, **large).save_pretrained(folder)


def write_tokenizer(folder: Path, words: Iterable[str]) -> None:
    """Write the files of a tokenizer of words, as a repository of the hub has them."""
    from transformers import BertTokenizerFast

    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


@contextlib.contextmanager
def loopback_hub(folder: Path) -> Iterator[str]:
    """Serve a folder's files as those of every repository; yield the address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            path = folder / parts[-1]
            if parts[:2] == ["api", "models"]:
                about = {"type": "file", "size": 1, "oid": "0" * 40}
                names = [{"rfilename": file.name, "path": file.name, **about} for file in folder.iterdir()]
                listing: Any = names if "tree" in parts else {"id": "a/b", "sha": "0" * 40, "siblings": names}
                self.answer(json.dumps(listing).encode())
            elif "resolve" in parts and path.is_file():
                self.answer(path.read_bytes())
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def named(name: str, folder: Path) -> str:
    """Return the name that an architecture is loaded by: with its first tag of the hub, or with a file."""
    tag = next(iter(sources(name)), "")
    return f"{name}@{tag or folder / 'open_clip_model.safetensors'}"


def sources(name: str) -> dict[str, str]:
    """Return the places on the hub of an architecture's weights, by tag."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    places = {tag: open_clip.get_pretrained_cfg(name, tag).get("hf_hub") for tag in tags}
    return {tag: place for tag, place in places.items() if place}


def run_step(step: str, model: str, parameters: int, scratch: Path) -> Step:
    """Carry out one of STEPS in this process."""
    import clip_rd_edge as edge
    from clip_rd_edge.bundle.manifest import write_manifest
    from clip_rd_edge.exporting.bundle import write_fp32
    from clip_rd_edge.models.load import load_clip

    started, processor = time.perf_counter(), time.process_time()
    found: dict[str, Any] = {}
    recipe = "siglip-kd" if step == "student" and "SigLIP" in model else "clip-kd"
    output, steps = scratch / step, 2 if parameters > LARGE else 20
    training = {
        "data": "emoji", "output": output, "recipe": recipe, "steps": steps, "batch_size": 2, "workers": 0,
        "precision": "fp32",
    }  # fmt: skip
    try:
        if step == "FP32":
            clip = load_clip(model)
            output.mkdir(parents=True)
            manifest = write_manifest(output, write_fp32(clip, output))
            towers = manifest.towers.values()
            found = {"difference": max(tower.measured.max_difference for tower in towers if tower.measured)}
        elif step == "INT8":
            found = {"towers": int8_towers(model, output, scratch / "FP32")}
        elif step == "student":
            edge.distill(**{**training, "student": model, "teacher": str(scratch.parent / "tiny")})
            found = {"steps": steps}
        else:
            edge.distill(**{**training, "student": "test_resnet", "image_size": 64, "text": "64x1", "teacher": model})
            found = {"steps": steps}
    except Exception as error:  # noqa: BLE001 — whatever fails is a result
        found = {"failed": reason(error)}
    return Step(
        seconds=time.perf_counter() - started,
        processor_seconds=time.process_time() - processor,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **found,
    )


def int8_towers(model: str, output: Path, source: Path) -> dict[str, Latency]:
    """Export a model in INT8 from its float32 bundle, whose towers are not exported again."""
    from clip_rd_edge.bundle.manifest import Tower, read_manifest
    from clip_rd_edge.exporting.bundle import export_bundle
    from clip_rd_edge.exporting.calibration import calibration_set, named_pairs
    from clip_rd_edge.exporting.plan import plan_exports
    from clip_rd_edge.models.encoder import TorchEncoder
    from clip_rd_edge.models.load import load_clip
    from clip_rd_edge.settings.deploying import Export

    request = Export(
        model=model, output=output, precision="int8", calibration="emoji", fallback="fp32",
        search_minutes=SEARCH_MINUTES, min_agreement=MIN_AGREEMENT,
    )  # fmt: skip
    clip = load_clip(model)
    samples = calibration_set(
        named_pairs("emoji", model), preprocessing=clip.preprocessing, tokenize=TorchEncoder(clip).tokenize
    )
    bundle = export_bundle(clip, output, plan_exports(request)[0], samples=samples, source=source)

    def latency_of(tower: Tower, before: Tower) -> Latency:
        measured = tower.measured
        assert measured is not None  # which an export always writes
        size, size_before = (
            sum(file.stat().st_size for file in folder.glob(f"{name}*"))  # weights above 2 GB have a file of their own
            for folder, name in ((output, tower.file), (source, before.file))
        )
        ms = measured.latency_ms_p50
        return Latency(
            fp32_ms=ms * measured.speedup, ms=ms, fp32_bytes=size_before, bytes=size, precision=tower.precision
        )

    before = read_manifest(source).towers
    return {name: latency_of(tower, before[name]) for name, tower in bundle.manifest.towers.items()}


def tiny_teacher(folder: Path) -> None:
    import torch

    from clip_rd_edge.models.load import save_clip
    from clip_rd_edge.models.students import build_student, student_config

    torch.manual_seed(0)
    config = student_config("test_resnet", embedding_size=64, image_size=64, text="64x1", context_length=16)
    save_clip(folder, build_student(config, name="tiny"), provenance={})


def take(name: str, work: Path, steps: Sequence[str], until: float) -> Row:
    """Take an architecture through the steps that are not done, each in a process of its own."""
    folder, path = work / name, work / f"{name}.json"
    row = msgspec.json.decode(path.read_bytes(), type=Row) if path.is_file() else Row(name=name)
    if all(step in row.steps for step in steps) or time.monotonic() > until:
        return row
    if not (work / "tiny").is_dir():
        tiny_teacher(work / "tiny")
    print(f"{name}: writing random weights", file=sys.stderr, flush=True)
    row.parameters = random_model(name, folder / "hub")
    model = named(name, folder / "hub")
    row.loaded_as = "a file" if "/" in model else model.partition("@")[2]
    with loopback_hub(folder / "hub") as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "NO_PROXY": "127.0.0.1"}
        wanted = [step for step in steps if step not in row.steps]
        if "INT8" in wanted and "FP32" not in wanted:
            wanted.insert(0, "FP32")  # which it is made from
        for step in wanted:
            if time.monotonic() > until:
                break
            print(f"{name}: {step}", file=sys.stderr, flush=True)
            shutil.rmtree(folder / step, ignore_errors=True)
            command = [sys.executable, "-m", "benchmarks.devices.published", str(work), "--step", step]
            command += ["--model", model, "--parameters", str(row.parameters), "--only", name]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
            lines = done.stdout.decode().splitlines()
            ended = Step(failed=f"the process ended with code {done.returncode}")
            row.steps[step] = msgspec.json.decode(lines[-1], type=Step) if done.returncode == 0 else ended
            path.write_bytes(msgspec.json.encode(row))
    shutil.rmtree(folder)
    return row


def table_of(rows: list[Row]) -> str:
    from clip_rd_edge.benchmarking.tables import markdown_table

    lines = [
        ["architecture", "loaded as", "weights, M", "FP32: largest difference", "image tower, ms: FP32, INT8",
         "text tower, ms: FP32, INT8", "size", "search, min", "peak, GB", "as a student", "as a teacher"],
    ]  # fmt: skip
    for row in (row for row in rows if row.steps):
        fp32, int8, student, teacher = (row.steps.get(step) for step in STEPS)
        towers = int8.towers if int8 else {}
        size = sum(tower.bytes for tower in towers.values()) / max(1, sum(t.fp32_bytes for t in towers.values()))
        lines.append(
            [
                row.name,
                row.loaded_as or "–",
                f"{row.parameters / 1e6:.0f}" if row.parameters else "–",
                shown(fp32, lambda step: f"{step.difference:.0e}"),
                *(shown(int8, lambda step, name=name: latency_text(step.towers[name])) for name in ("image", "text")),
                shown(int8, lambda step, size=size: f"× {size:.2f}"),
                shown(int8, lambda step: f"{step.processor_seconds / 60:.1f}"),
                shown(int8, lambda step: f"{step.peak_bytes / 1e9:.1f}"),
                *(shown(step, lambda step: f"{step.steps} steps") for step in (student, teacher)),
            ]
        )
    return markdown_table(lines, left=(0, 1))


def latency_text(tower: Latency) -> str:
    return f"{tower.fp32_ms:.1f}, {tower.ms:.1f}" if tower.precision != "fp32" else f"{tower.fp32_ms:.1f}, stays FP32"


def shown(step: Step | None, text: Callable[[Any], str]) -> str:
    return NOT_RUN if step is None else step.failed or text(step)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path, help="folder for what is done")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no step after this time")
    for option in ("--step", "--model", "--parameters"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    add_output_options(parser, "published")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.step:
        scratch = args.work.resolve() / args.only[0]
        print(json.dumps(msgspec.to_builtins(run_step(args.step, args.model, int(args.parameters), scratch))))
        return
    until = time.monotonic() + 60 * args.minutes
    rows = [
        take(name, args.work.resolve(), args.steps, until) if name in args.only else kept(name, args.work)
        for name in NAMES
    ]
    from clip_rd_edge.benchmarking.results import this_environment

    results = {"environment": msgspec.to_builtins(this_environment()), "weights": "random", "rows": rows}
    publish(results, table_of(rows), args)


def kept(name: str, work: Path) -> Row:
    path = work / f"{name}.json"
    return msgspec.json.decode(path.read_bytes(), type=Row) if path.is_file() else Row(name=name)


if __name__ == "__main__":
    main()
